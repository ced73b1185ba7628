#!/usr/bin/busybox sh
# The first process of the machine that `cargo xtask test kernels` boots: makes an empty system look like a host, runs
# each line of /plan (a name, a test program, its arguments) and says on the console how it ended.
bb=/usr/bin/busybox
$bb mkdir -p /bin /proc /sys /dev /run /tmp /root /var/log/nginx /var/lib/nginx
$bb --install -s /bin
# iproute2 and the others come before busybox's own.
export PATH=/usr/bin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ln -s /run /var/run
ln -s /proc/self/fd /dev/fd
for module in /modules/*.ko; do insmod "$module" || echo "init: $module does not load"; done
ip link set lo up
ulimit -n 65536
echo "init: $(uname -r) after $(cut -d' ' -f1 /proc/uptime) s"
while read -r name program arguments; do
    echo "@@ begin $name"
    # shellcheck disable=SC2086 # several words on purpose
    "$program" --test-threads=1 --show-output $arguments </dev/null 2>&1
    echo "@@ end $?"
done </plan
poweroff -f
