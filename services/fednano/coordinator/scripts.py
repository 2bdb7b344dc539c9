"""The Lua scripts: whatever must be seen whole or not at all.

One Redis, not a cluster: keys also come inside arguments.
"""

from __future__ import annotations

# A guarded transaction. KEYS: the leader's lease.
# ARGV: lease ("" asks for none), guards, (hash, field, value)*, (count, command, argument*)*.
# A guard's field "" stands for how many fields there are.
# 1: done, 0: a guard did not hold, -1: the lease is another's.
COMMIT = """
if ARGV[1] ~= '' and redis.call('GET', KEYS[1]) ~= ARGV[1] then return -1 end
local function found(hash, field)
  if field == '' then return tostring(redis.call('HLEN', hash)) end
  return redis.call('HGET', hash, field) or ''
end
local at = 3
for _ = 1, tonumber(ARGV[2]) do
  if found(ARGV[at], ARGV[at + 1]) ~= ARGV[at + 2] then return 0 end
  at = at + 3
end
while at <= #ARGV do
  local count = tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, at + count))
  at = at + count + 1
end
return 1
"""

# KEYS: lease, fence. ARGV: owner, milliseconds. The lease, or nothing where another holds it.
ACQUIRE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return false end
local lease = ARGV[1] .. ':' .. redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], lease, 'PX', ARGV[2])
return lease
"""

# KEYS: lease. ARGV: the lease, milliseconds. 1: still ours.
RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS: lease. ARGV: the lease.
RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

# Shared: counts what a client spent. `costs` is a list of (sent:kind or received:kind, bytes)*.
# Whoever spends does so before anything else is written: a script that fails isn't rolled back.
_SPEND = """
local function spend(index, member, row, totals, round_bytes, costs, client_s, server_s)
  redis.call('ZADD', index, 0, member)
  for i = 1, #costs, 2 do
    -- pcall: a counter that can't rise any further stays where it is.
    redis.pcall('HINCRBY', row, costs[i], costs[i + 1])
    redis.pcall('HINCRBY', totals, costs[i], costs[i + 1])
    redis.pcall('HINCRBY', round_bytes, string.match(costs[i], ':(.*)'), costs[i + 1])
  end
  redis.call('HINCRBYFLOAT', row, 'client_seconds', client_s)
  redis.call('HINCRBYFLOAT', row, 'server_seconds', server_s)
end
local function tell(stream, bell, kind, data)
  redis.call('XADD', stream, 'MAXLEN', '~', 10000, '*', 'kind', kind, 'data', data)
  redis.call('PUBLISH', bell, kind)
end
local function tail(from)
  local rest = {}
  for i = from, #ARGV do rest[#rest + 1] = ARGV[i] end
  return rest
end
"""

# Claims an update with its metadata.
# KEYS: run, round, client, update, cohort, submitted, refused, late, events,
#       ledger index, ledger row, ledger totals, round bytes.
# ARGV: client, session, round, attempt, refusal ("" where valid), metadata, bytes, bell,
#       ledger member, client seconds, server seconds, data of the event for accepted, late,
#       refused, (cost, bytes)*.
# Answers accepted, duplicate, late, refused, or session.
CLAIM_UPDATE = (
    _SPEND
    + """
if redis.call('HGET', KEYS[3], 'session') ~= ARGV[2] then return 'session' end
if redis.call('HEXISTS', KEYS[6], ARGV[1]) == 1 then return 'duplicate' end
local function count()
  spend(KEYS[10], ARGV[9], KEYS[11], KEYS[12], KEYS[13], tail(15), ARGV[10], ARGV[11])
end
local function answer(result, event)
  tell(KEYS[9], ARGV[8], 'update', event)
  return result
end
local run = redis.call('HMGET', KEYS[1], 'state', 'round')
local round = redis.call('HMGET', KEYS[2], 'state', 'attempt')
local open = (run[1] == 'running' or run[1] == 'paused') and run[2] == ARGV[3]
  and round[1] == 'collecting' and round[2] == ARGV[4]
if redis.call('SISMEMBER', KEYS[5], ARGV[1]) == 0 then return 'stranger' end
if not open then
  if redis.call('SISMEMBER', KEYS[8], ARGV[1]) == 1 then return 'late' end
  count()
  redis.call('SADD', KEYS[8], ARGV[1])
  return answer('late', ARGV[13])
end
if ARGV[5] ~= '' then
  local again = redis.call('HEXISTS', KEYS[7], ARGV[1]) == 1
  if not again then count() end
  redis.call('HSET', KEYS[7], ARGV[1], ARGV[5])
  if again then return 'refused' end
  return answer('refused', ARGV[14])
end
local samples = string.format('%d', cjson.decode(ARGV[6]).samples)
count()
redis.call('SET', KEYS[4], ARGV[7])
redis.call('HSET', KEYS[6], ARGV[1], ARGV[6])
redis.call('HDEL', KEYS[7], ARGV[1])
redis.call('HSET', KEYS[3], 'samples', samples)
return answer('accepted', ARGV[12])
"""
)

# Claims a client's evaluation of a round.
# KEYS: run, round, client, evaluations, events, ledger index, ledger row, ledger totals,
#       round bytes.
# ARGV: client, session, round, attempt, evaluation, bell, ledger member, client seconds,
#       server seconds, data of the event, (cost, bytes)*.
# Answers accepted, duplicate, late, or session.
CLAIM_EVALUATION = (
    _SPEND
    + """
if redis.call('HGET', KEYS[3], 'session') ~= ARGV[2] then return 'session' end
if redis.call('HEXISTS', KEYS[4], ARGV[1]) == 1 then return 'duplicate' end
local run = redis.call('HMGET', KEYS[1], 'state', 'round')
local round = redis.call('HMGET', KEYS[2], 'state', 'attempt')
if (run[1] ~= 'running' and run[1] ~= 'paused') or run[2] ~= ARGV[3]
  or round[1] ~= 'evaluating' or round[2] ~= ARGV[4] then return 'late' end
spend(KEYS[6], ARGV[7], KEYS[7], KEYS[8], KEYS[9], tail(11), ARGV[8], ARGV[9])
redis.call('HSET', KEYS[4], ARGV[1], ARGV[5])
tell(KEYS[5], ARGV[6], 'evaluation', ARGV[10])
return 'accepted'
"""
)

# A sign of life.
# KEYS: client, events, ledger index, ledger row, ledger totals, round bytes.
# ARGV: session, now, progress, doing, expiry of the LLM token (ms), bell, data of the event,
#       ledger member ("" where nothing was spent), client seconds, server seconds, (cost, bytes)*.
# 1: the session is current.
BEAT = (
    _SPEND
    + """
local was = redis.call('HMGET', KEYS[1], 'session', 'state', 'doing')
if was[1] ~= ARGV[1] then return 0 end
if ARGV[8] ~= '' then
  spend(KEYS[3], ARGV[8], KEYS[4], KEYS[5], KEYS[6], tail(11), ARGV[9], ARGV[10])
end
redis.call('HSET', KEYS[1], 'last_seen', ARGV[2], 'progress', ARGV[3], 'doing', ARGV[4],
  'token_expires_ms', ARGV[5], 'state', 'alive')
if was[2] ~= 'alive' or was[3] ~= ARGV[4] then tell(KEYS[2], ARGV[6], 'client', ARGV[7]) end
return 1
"""
)

# A client that asks for its task: its session is checked, it is heard, and it gets what is offered
# unless it isn't meant or is done with that already.
# KEYS: client, done (hash of clients). ARGV: client, session, token id, now, label of the offer
# ("" for none), role that it is for ("" for any), guards, (hash, field, value)*.
# {0}: the session has ended, {1}: a guard did not hold, {2, label or "", role, shard}.
ATTEND = """
local was = redis.call('HMGET', KEYS[1], 'session', 'token_id', 'role', 'shard')
if was[1] ~= ARGV[2] or was[2] ~= ARGV[3] then return {0} end
local at = 8
for _ = 1, tonumber(ARGV[7]) do
  if (redis.call('HGET', ARGV[at], ARGV[at + 1]) or '') ~= ARGV[at + 2] then return {1} end
  at = at + 3
end
local label = ARGV[5]
if label ~= '' and ((ARGV[6] ~= '' and ARGV[6] ~= was[3])
  or redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1) then label = '' end
redis.call('HSET', KEYS[1], 'last_seen', ARGV[4], 'task', label)
return {2, label, was[3], was[4]}
"""

# Where a run stands, unless the caller knows it already.
# KEYS: run. ARGV: prefix of its rounds, and of what is known: the run's version and creation and
# the round's version.
# 0: there is no such run, 1: it is as it was, or the fields of the run and of its round.
STANDING = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local run = redis.call('HMGET', KEYS[1], 'version', 'created_at', 'round')
local round = ARGV[1] .. (run[3] or '')
if run[1] == ARGV[2] and run[2] == ARGV[3]
  and (redis.call('HGET', round, 'version') or '') == ARGV[4] then return 1 end
return {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', round)}
"""

# A few fields of every client. KEYS: clients. ARGV: prefix of theirs, field*.
# A list of (client, value*) for each that is there.
GLANCE = """
local found = {}
local fields = {unpack(ARGV, 2)}
for _, client in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local values = redis.call('HMGET', ARGV[1] .. client, unpack(fields))
  if values[1] then
    table.insert(values, 1, client)
    found[#found + 1] = values
  end
end
return found
"""

# Who holds a token. KEYS: hashes, tokens. ARGV: the secret's hash. The record, or nothing.
IDENTIFY = """
local token = redis.call('HGET', KEYS[1], ARGV[1])
return token and redis.call('HGET', KEYS[2], token)
"""
