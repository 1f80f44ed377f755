#!/bin/busybox sh
# PID 1 of the tiny test guest, and the stepping stone to a root disk (root=DEVICE).
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module; do $b insmod "/modules/$module.ko" 2>/dev/null; done < /modules/order
root=
for word in $($b cat /proc/cmdline); do
    case $word in root=*) root=${word#root=} ;; esac
done
if [ -n "$root" ]; then
    # The disk may appear a moment after its driver was loaded.
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ -b "$root" ] && break; $b usleep 100000; done
    if $b mount -o noatime "$root" /mnt; then
        $b umount /sys; $b umount /proc
        $b mount -o move /dev /mnt/dev
        exec $b switch_root /mnt /sbin/init
    fi
    echo "cannot mount $root"
fi
$b --install -s /bin
export PATH=/bin HOME=/root
echo "guest: user space on $($b uname -r), $($b nproc) CPUs, up $($b cut -d' ' -f1 /proc/uptime) s"
for word in $($b cat /proc/cmdline); do
    case $word in
        guest.poweroff) $b poweroff -f ;;
        guest.reboot) $b reboot -f ;;
    esac
done
[ -x /bin/clone-agent ] && exec /bin/clone-agent
exec $b setsid -c $b sh </dev/ttyS0 >/dev/ttyS0 2>&1
