# What follows is the same in every such script. The settings are above.

set -u # and not -e: exit codes are what this script is about

log=$(readlink -f /proc/$$/fd/2) # the job's output
step=                            # process of the srun that runs the launchers
told=                            # the signal that told this run to stop
interrupted=                     # whether a signal ended `wait`
code=                            # that the latest run ended with

say() { echo "slurm: $*" >&2; }
note() { echo "$(date +%FT%T) $*" >>"$history"; }
joined() { local IFS=,; echo "$*"; }

# Nodes that failed a health check, or as often as --node-failures.
failed_nodes() {
  [ ! -f "$history" ] || awk -v limit="$node_failures" '
    $2 == "node" { failures[$3] += $5 == "health" ? limit : 1 }
    END { for (node in failures) if (failures[node] >= limit) print node }' "$history" | sort
}

failures_in_a_row() {
  awk '$2 == "run" && $3 == "stopped:" { n = 0 } $2 == "run" && $3 == "failed:" { n++ } END { print n + 0 }' "$history"
}

# -- how a run of the job ends --

# finish CODE WHY: for good.
finish() {
  note "job ended: $1"
  say "$2"
  exit "$1"
}

# again WHY: and Slurm starts it again.
again() {
  local exclude_list state
  mapfile -t exclude_list < <(failed_nodes)
  exclude_list+=("${exclude[@]}")
  say "$1"
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r')
  case $state in
    "COMPLETING TimeLimit") ;; # too late for a save; the newest checkpoint is there
    COMPLETING*)
      say "Slurm is ending this job already: it was cancelled, or Slurm has requeued it by itself"
      exit 75
      ;;
  esac
  if [ "$restarts" = array ]; then
    [ "$SLURM_ARRAY_TASK_ID" -lt "$SLURM_ARRAY_TASK_MAX" ] || say "this was the last element of the job array"
    if [ ${#exclude_list[@]} -gt 0 ]; then # those that have started are not changed, and Slurm says so
      scontrol update JobId="$SLURM_ARRAY_JOB_ID" ExcNodeList="$(joined "${exclude_list[@]}")" 2>/dev/null
    fi
    exit 75
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
    finish 75 "requeued $max_requeues times, as often as --max-requeues allows"
  fi
  trap '' TERM USR1 # Slurm ends a job that is requeued, and this shell has something left to do
  scontrol requeue "$SLURM_JOB_ID" || finish 75 "Slurm does not requeue this job. Use --restarts array."
  # Only a job that waits can be told which nodes to avoid, and it does not start before this shell has ended.
  if [ ${#exclude_list[@]} -gt 0 ]; then
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(joined "${exclude_list[@]}")"
  fi
  exit 75
}

# -- signals --

# shellcheck disable=SC2317  # called by the traps
hand_on() {
  interrupted=1
  if [ "$1" = TERM ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = COMPLETING ]; then
    again "$1: Slurm ends this job"
  fi
  [ -z "$told" ] || return # a second signal would end the ranks in the middle of their save
  told=$1
  # srun hands USR1 on to its tasks; TERM it would answer by killing them.
  [ -z "$step" ] || kill -USR1 "$step"
}
trap 'hand_on USR1' USR1
trap 'hand_on TERM' TERM

# -- nodes --

# Leaves those in `usable` that pass; notes the others.
check_nodes() {
  local passed node
  # shellcheck disable=SC2016  # expanded on the node
  passed=$(srun --nodes=${#usable[@]} --ntasks=${#usable[@]} --nodelist="$(joined "${usable[@]}")" --cpu-bind=none \
    --kill-on-bad-exit=0 bash -c '
      if said=$(timeout --kill-after=10 600 bash -c "$0" 2>&1); then
        echo "$SLURMD_NODENAME"
      else
        printf "%s does not pass the health check:\n%s\n" "$SLURMD_NODENAME" "$said" >&2
        exit 1
      fi' "$health_check")
  if [ -z "$passed" ] && [ ${#usable[@]} -gt 1 ]; then
    finish 1 "none of ${#usable[@]} nodes passes: --health-check '$health_check' may be wrong itself"
  fi
  for node in "${usable[@]}"; do
    grep -qxF "$node" <<<"$passed" || note "node $node failed: health check"
  done
  mapfile -t usable < <(printf '%s' "${passed:+$passed$'\n'}" | sort -V)
}

# What was said since the run started, at its end.
last_words() { tail -c "+$((log_start + 1))" "$log" | tail -c 1000000; }

# The node that a run failed by, if that can be told: by what the launchers say at their end, or a straggler that leaves;
# or else because it is gone, or its launcher was killed. Exit codes tell nothing: all launchers end with the same.
blamed() {
  local name
  name=$(last_words | sed -nE \
    -e 's/^launch: rank [0-9]+ on ([^ .:]+).*; not started again: .*/\1/p' \
    -e 's/.*rank [0-9]+ on ([^ .:]+)[^ ]* computed .* Restart without this host.*/\1/p' | tail -n 1)
  if ! printf '%s\n' "${chosen[@]}" | grep -qxF -- "$name"; then
    name=$(last_words | sed -nE \
      -e 's/^srun: error: Node failure on ([^], []+)$/\1/p' \
      -e '/Exited with exit code/d' \
      -e 's/^srun: error: ([^], :[]+): task [0-9]+: .*/\1/p' | head -n 1)
  fi
  printf '%s\n' "${chosen[@]}" | grep -xF -- "$name"
}

# -- one run: starts the launchers, waits for them, takes their exit code --

run() {
  local number address port meaning
  number=$(grep -c ' run started' "$history")
  # NodeAddr is what Slurm itself reaches a node by; a node's name may be Slurm's alone.
  address=$(scontrol show node "${chosen[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  port=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that systems give away by themselves
  log_start=$(stat -c %s "$log")
  # In a session of its own, srun does not get the signals that Slurm sends to this shell's processes. --wait gives
  # launchers that still save the time to do so, after the first one has ended.
  setsid srun --nodes="$nodes" --ntasks="$nodes" --nodelist="$(joined "${chosen[@]}")" --cpu-bind=none \
    --kill-on-bad-exit=0 --wait="$signal_before" \
    lightning-llm launch --nnodes "$nodes" --nproc-per-node "$nproc_per_node" --max-restarts "$max_restarts" \
    --rdzv-endpoint "$address:$port" --rdzv-id "$SLURM_JOB_ID-$number" -- "${command[@]}" &
  step=$!
  [ -z "$told" ] || kill -USR1 "$step"
  while # a signal ends `wait`, and its exit code is then not that of srun
    interrupted=
    wait "$step"
    code=$?
    [ -n "$interrupted" ]
  do :; done
  step=
  # srun's code is the highest one of its tasks, which may be that of a launcher that had to be killed.
  meaning=$(last_words | sed -nE 's/^srun: error: .*Exited with exit code (2|75|76|77|93)$/\1/p' | sort -n | tail -n 1)
  code=${meaning:-$code}
}

# -- the job --

mkdir -p "$(dirname "$history")"
touch "$history"
ended=$(sed -n 's/.* job ended: //p' "$history" | tail -n 1)
if [ "$restarts" = array ] && [ -n "$ended" ]; then
  say "an earlier element of this job array has ended the run, with $ended"
  exit "$ended"
fi
command -v lightning-llm >/dev/null || finish 2 "there is no lightning-llm: --env-setup must put it into PATH"

mapfile -t usable < <(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF -f <(failed_nodes))
[ -z "$health_check" ] || [ ${#usable[@]} -eq 0 ] || check_nodes
while [ ${#usable[@]} -ge "$nodes" ]; do
  [ -z "$told" ] || again "$told: not started"
  chosen=("${usable[@]:0:nodes}")
  note "run started on $(joined "${chosen[@]}")"
  run
  case $code in
    0) finish 0 "done" ;;
    2 | 76 | 77 | 93) finish "$code" "exit code $code: another run would end like this one" ;;
  esac
  if [ -n "$told" ]; then
    note "run stopped: $told"
    again "$told: the run was told to stop, and ended with $code"
  fi
  node=$(blamed)
  [ -z "$node" ] || note "node $node failed: exit code $code"
  if [ "$code" -eq 75 ]; then
    note "run stopped: exit code 75${node:+ for $node}"
  else
    note "run failed: exit code $code"
    if [ "$(failures_in_a_row)" -ge "$max_failures" ]; then
      finish "$code" "exit code $code: --max-failures $max_failures runs in a row have failed"
    fi
  fi
  # With a spare node in the job, the one that failed is left out at once.
  [ -n "$node" ] || break
  mapfile -t usable < <(printf '%s\n' "${usable[@]}" | grep -vxF -- "$node")
done
if [ -z "$code" ]; then
  again "${#usable[@]} of $nodes nodes can be used"
fi
again "exit code $code${node:+, by $node}"
