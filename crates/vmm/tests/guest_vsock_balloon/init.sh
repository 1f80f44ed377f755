#!/bin/busybox sh
# PID 1: the Debian on the disk, read-only, with one program in it.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module; do $b insmod "/modules/$module.ko" 2>/dev/null; done < /modules/order
for _ in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; $b usleep 100000; done
$b mount -o ro,noload /dev/vda /mnt
for name in proc sys dev; do $b mount -o bind "/$name" "/mnt/$name"; done
$b mount -t tmpfs run /mnt/run
$b cp /service.py /mnt/run/
exec $b chroot /mnt /usr/bin/python3 -u /run/service.py
