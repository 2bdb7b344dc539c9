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

# Shared: counts what a client spent; 1 where that was new. A request that is repeated, as its name
# shows, is counted once; one without a name ("") always.
# KEYS from `first`: ledger index, row, totals, round bytes, reports.
# ARGV from `from`: ledger member, who reports, request, client seconds, server seconds, (sent:kind or
# received:kind, bytes)*.
# Whoever spends does so before anything else is written: a script that fails isn't rolled back.
_SPEND = """
local function spend(first, from)
  local row, totals, round_bytes, reports = unpack(KEYS, first + 1, first + 4)
  local request = ARGV[from + 2]
  if request ~= '' then
    if redis.call('HGET', reports, ARGV[from + 1]) == request then return 0 end
    redis.call('HSET', reports, ARGV[from + 1], request)
  end
  redis.call('ZADD', KEYS[first], 0, ARGV[from])
  for i = from + 5, #ARGV, 2 do
    -- pcall: a counter that can't rise any further stays where it is.
    redis.pcall('HINCRBY', row, ARGV[i], ARGV[i + 1])
    redis.pcall('HINCRBY', totals, ARGV[i], ARGV[i + 1])
    redis.pcall('HINCRBY', round_bytes, string.match(ARGV[i], ':(.*)'), ARGV[i + 1])
  end
  for i, name in ipairs({'client_seconds', 'server_seconds'}) do
    redis.call('HINCRBYFLOAT', row, name, ARGV[from + 2 + i])
    redis.call('HINCRBYFLOAT', totals, name, ARGV[from + 2 + i])
  end
  return 1
end
local function tell(stream, bell, kind, data)
  redis.call('XADD', stream, 'MAXLEN', '~', 10000, '*', 'kind', kind, 'data', data)
  redis.call('PUBLISH', bell, kind)
end
"""

# Claims an update with its metadata.
# KEYS: run, round, client, update, cohort, submitted, refused, late, events, five of the ledger.
# ARGV: client, session, round, attempt, refusal ("" where valid), metadata, bytes, bell,
#       data of the event for accepted, late, refused, what was spent.
# {accepted, duplicate, late, refused, stranger or session, whether the costs were counted}.
CLAIM_UPDATE = (
    _SPEND
    + """
if redis.call('HGET', KEYS[3], 'session') ~= ARGV[2] then return {'session', 0} end
if redis.call('HEXISTS', KEYS[6], ARGV[1]) == 1 then return {'duplicate', spend(10, 12)} end
if redis.call('SISMEMBER', KEYS[5], ARGV[1]) == 0 then return {'stranger', 0} end
local counted = spend(10, 12)
local function answer(result, event)
  tell(KEYS[9], ARGV[8], 'update', event)
  return {result, counted}
end
local run = redis.call('HMGET', KEYS[1], 'state', 'round')
local round = redis.call('HMGET', KEYS[2], 'state', 'attempt', 'wanted')
local wanted = tonumber(round[3] or 0)  -- 0: an earlier version opened the round
local full = wanted > 0 and redis.call('HLEN', KEYS[6]) >= wanted
local open = (run[1] == 'running' or run[1] == 'paused') and run[2] == ARGV[3]
  and round[1] == 'collecting' and round[2] == ARGV[4] and not full
if not open then
  if redis.call('SADD', KEYS[8], ARGV[1]) == 0 then return {'late', counted} end
  return answer('late', ARGV[10])
end
if ARGV[5] ~= '' then
  local again = redis.call('HEXISTS', KEYS[7], ARGV[1]) == 1
  redis.call('HSET', KEYS[7], ARGV[1], ARGV[5])
  if again then return {'refused', counted} end
  return answer('refused', ARGV[11])
end
local samples = string.format('%d', cjson.decode(ARGV[6]).samples)
redis.call('SET', KEYS[4], ARGV[7])
redis.call('HSET', KEYS[6], ARGV[1], ARGV[6])
redis.call('HDEL', KEYS[7], ARGV[1])
redis.call('HSET', KEYS[3], 'samples', samples)
return answer('accepted', ARGV[9])
"""
)

# Claims an update of an asynchronous run, for the round that is being filled.
# KEYS: run, the round that the run is in, client, update, answered, submitted, refused, late, events,
#       five of the ledger.
# ARGV: client, session, part, the run's round, that round's state and attempt as they were seen,
#       why it is late ("" where it isn't), refusal ("" where valid), metadata, bytes, bell, where it
#       becomes part, data of the event for accepted, late, refused, what was spent.
# {accepted, duplicate, late, refused, moved (nothing was done) or session, whether costs counted}.
CLAIM_PART = (
    _SPEND
    + """
if redis.call('HGET', KEYS[3], 'session') ~= ARGV[2] then return {'session', 0} end
local run = redis.call('HMGET', KEYS[1], 'state', 'round')
local round = redis.call('HMGET', KEYS[2], 'state', 'attempt')
if redis.call('HEXISTS', KEYS[5], ARGV[1]) == 1 then return {'duplicate', spend(10, 16)} end
local over = run[1] ~= 'running' and run[1] ~= 'paused'
if not over and (run[2] ~= ARGV[4] or round[1] ~= ARGV[5] or round[2] ~= ARGV[6]) then
  return {'moved', 0}
end
local counted = spend(10, 16)
local function answer(result, event)
  tell(KEYS[9], ARGV[11], 'update', event)
  return {result, counted}
end
if over or ARGV[7] ~= '' then
  if redis.call('SADD', KEYS[8], ARGV[1]) == 0 then return {'late', counted} end
  return answer('late', ARGV[14])
end
if ARGV[8] ~= '' then
  local again = redis.call('HEXISTS', KEYS[7], ARGV[1]) == 1
  redis.call('HSET', KEYS[7], ARGV[1], ARGV[8])
  if again then return {'refused', counted} end
  return answer('refused', ARGV[15])
end
local samples = string.format('%d', cjson.decode(ARGV[9]).samples)
redis.call('SET', KEYS[4], ARGV[10])
redis.call('HSET', KEYS[6], ARGV[3], ARGV[9])
redis.call('HSET', KEYS[5], ARGV[1], ARGV[12])
redis.call('HDEL', KEYS[7], ARGV[1])
redis.call('HSET', KEYS[3], 'samples', samples)
return answer('accepted', ARGV[13])
"""
)

# Claims a client's evaluation of a round.
# KEYS: run, round, client, evaluations, events, five of the ledger.
# ARGV: client, session, round, attempt, refusal ("" where valid), evaluation, bell, data of the
#       event, what was spent.
# {accepted, duplicate, late, refused or session, whether the costs were counted}.
CLAIM_EVALUATION = (
    _SPEND
    + """
if redis.call('HGET', KEYS[3], 'session') ~= ARGV[2] then return {'session', 0} end
local run = redis.call('HMGET', KEYS[1], 'state', 'round')
local round = redis.call('HMGET', KEYS[2], 'state', 'attempt')
local counted = 0
if tonumber(ARGV[3]) <= tonumber(run[2] or -1) then counted = spend(6, 9) end
if redis.call('HEXISTS', KEYS[4], ARGV[1]) == 1 then return {'duplicate', counted} end
if ARGV[5] ~= '' then return {'refused', counted} end
if (run[1] ~= 'running' and run[1] ~= 'paused') or run[2] ~= ARGV[3]
  or round[1] ~= 'evaluating' or round[2] ~= ARGV[4] then return {'late', counted} end
redis.call('HSET', KEYS[4], ARGV[1], ARGV[6])
tell(KEYS[5], ARGV[7], 'evaluation', ARGV[8])
return {'accepted', counted}
"""
)

# A sign of life.
# KEYS: client, events, five of the ledger.
# ARGV: session, now, progress, doing, expiry of the LLM token (ms), bell, data of the event,
#       what was spent (its ledger member is "" where that is nothing).
# 0: the session is not current, 1: it is, 2: and costs were counted.
BEAT = (
    _SPEND
    + """
local was = redis.call('HMGET', KEYS[1], 'session', 'state', 'doing')
if was[1] ~= ARGV[1] then return 0 end
local counted = 0
if ARGV[8] ~= '' then counted = spend(3, 8) end
redis.call('HSET', KEYS[1], 'last_seen', ARGV[2], 'progress', ARGV[3], 'doing', ARGV[4],
  'token_expires_ms', ARGV[5], 'state', 'alive')
if was[2] ~= 'alive' or was[3] ~= ARGV[4] then tell(KEYS[2], ARGV[6], 'client', ARGV[7]) end
return 1 + counted
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
