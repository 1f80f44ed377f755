#!/bin/busybox sh
# PID 1 of the testbed until the supervisor takes over: modules, then the host's root under a
# writable overlay, with only the shared folders writable for real.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
load() {
    while read -r module; do
        parameters=
        # Words on the kernel's command line are for modprobe, which is not here.
        [ "$module" = kvm ] && parameters="report_ignored_msrs=0"
        $b insmod "/modules/$module.ko" $parameters || echo "testbed: cannot load $module"
    done < "/modules/$1.order"
}
load root
load host0
load host1
for word in $($b cat /proc/cmdline); do
    case $word in testbed.*) value=${word#*=}; name=${word%%=*}; eval "${name#testbed.}=\$value" ;; esac
done
fs9p="trans=virtio,version=9p2000.L,msize=512000"
$b mount -t 9p -o "ro,$fs9p,cache=loose" root /lower || echo "testbed: no root"
$b mount -t tmpfs tmpfs /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
# Sources change outside while we run, so their metadata is never cached.
$b mount -t 9p -o "ro,$fs9p,cache=mmap" workspace "/root$workspace" || echo "testbed: no workspace"
$b mount -t 9p -o "$fs9p,cache=mmap" target "/root$target" || echo "testbed: no target folder"
[ -n "$assets" ] && $b mount -t 9p -o "$fs9p,cache=mmap" assets "/root$assets"
$b mount -t proc proc /root/proc
$b mount -t sysfs sysfs /root/sys
$b mount -t devtmpfs devtmpfs /root/dev
$b mkdir -p /root/dev/pts /root/dev/shm
$b mount -t devpts -o ptmxmode=666 devpts /root/dev/pts
$b mount -t tmpfs tmpfs /root/dev/shm
$b mount -t tmpfs -o mode=755 tmpfs /root/run
$b mount -t tmpfs -o mode=1777 tmpfs /root/tmp
$b mount -t securityfs securityfs /root/sys/kernel/security
$b mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
$b mount -t tracefs tracefs /root/sys/kernel/tracing 2>/dev/null
$b mount -t debugfs debugfs /root/sys/kernel/debug 2>/dev/null
echo 1 > /proc/sys/vm/unprivileged_userfaultfd
$b hostname testbed
$b ifconfig lo up
wait
# The network card, where a port is forwarded (machine.rs).
[ -e /sys/class/net/eth0 ] && $b ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
[ -n "$spare" ] && {
    echo vfio-pci > "/sys/bus/pci/devices/$spare/driver_override"
    [ -e "/sys/bus/pci/devices/$spare/driver" ] &&
        echo "$spare" > "/sys/bus/pci/devices/$spare/driver/unbind"
    echo "$spare" > /sys/bus/pci/drivers_probe
}
exec $b chroot /root "$supervisor" testbed supervise
