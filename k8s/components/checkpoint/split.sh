# Run in the volume's directory, by the Job of split.yaml:  sh split.sh
# What is there is kept. Halves are moved into place when both are whole; until then nobody uses them.
set -eu
if [ -d halves ]; then
  echo "halves are there already"
  exit 0
fi
if [ ! -f checkpoint/config.json ]; then
  # One that broke off is taken up again.
  hf download "$MODEL" --revision "$REVISION" --local-dir download
  mv download checkpoint
fi
rm -rf part
fednano split checkpoint --out part
mv part halves
