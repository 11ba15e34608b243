#!/usr/bin/env bash
# The job templates on a real Slurm: two nodes on this machine, in a throw-away overlay and namespaces of its own.
#   bash tests/slurm/run.sh [VENV [CASE...]]
# Cases, all if not given: stop signals preemptions walltime node gpu plan sweep. Nothing outside the overlay is touched. Skipped,
# with the reason, without root, apt-get or overlays.
set -eu
root=$(realpath "$(dirname "$0")/../..")
venv=${1:-$root/.venv-test-mpich}
[ $# -gt 1 ] || set -- "$venv" stop signals preemptions walltime node gpu plan sweep

skip() { echo "tests/slurm: skipped: $1"; exit 0; }
[ "$(id -u)" = 0 ] || skip "it needs root, to mount an overlay"
command -v apt-get >/dev/null || skip "it installs Slurm with apt-get, which is not here"
[ -x "$venv/bin/python" ] || skip "no environment at $venv: run tests/run.sh first"
box=$(mktemp -d)
trap 'rmdir "$box"' EXIT
unshare --mount bash -c "mount --make-rprivate / && mount -t tmpfs tmpfs $box && mkdir $box/up $box/work $box/root &&
    mount -t overlay overlay -o lowerdir=/,upperdir=$box/up,workdir=$box/work $box/root" 2>/dev/null ||
    skip "overlays cannot be mounted here"

unshare --mount bash -s "$box" "$root" "$@" <<'OUTER'
set -eu
box=$1 root=$2 venv=$3
shift 3
mount --make-rprivate /
mount -t tmpfs -o size=4g tmpfs "$box"
mkdir "$box/up" "$box/work" "$box/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$box/up,workdir=$box/work" "$box/root"
for place in proc sys dev; do mount --rbind "/$place" "$box/root/$place"; done
mount -t tmpfs tmpfs "$box/root/run"
mount -t tmpfs tmpfs "$box/root/dev/shm" # shared memory has names, and the process numbers in them are not unique in here
# Other file systems of this machine are not part of the overlay: what the tests need is bound, read-only.
for place in "$root" "$venv"; do
    mkdir -p "$box/root$place" && mount --bind "$place" "$box/root$place" && mount -o remount,bind,ro "$box/root$place"
done
cp /etc/resolv.conf "$box/root/etc/resolv.conf" 2>/dev/null || true
chroot "$box/root" bash -c '
    printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurm-wlm munge libpmi2-0 iproute2' >"$box/apt.log" 2>&1 ||
    { echo "tests/slurm: skipped: Slurm could not be installed: $(tail -n 1 "$box/apt.log")"; exit 0; }
exec unshare --mount --pid --fork --kill-child --net --uts --ipc bash -c \
    "mount --make-rprivate /; mount -t proc proc $box/root/proc
     exec chroot $box/root bash $root/tests/slurm/inside.sh $root $venv $*"
OUTER
