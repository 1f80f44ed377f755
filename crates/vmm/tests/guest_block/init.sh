#!/bin/busybox sh
# PID 1: puts the test's disks to work and tells how it went, a line for each claim.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module; do $b insmod "/modules/$module.ko" 2>/dev/null; done < /modules/order
for _ in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vdd ] && break; $b usleep 100000; done

claim() { # NAME COMMAND…
    name=$1; shift
    if "$@"; then echo "claim $name: holds"; else echo "claim $name: broken"; fi
}
same() { # DISK FILE BLOCKS-OF-64K: what the disk itself has, not the page cache
    echo 3 > /proc/sys/vm/drop_caches
    $b dd "if=$1" bs=64k skip=3 "count=$3" 2>/dev/null | $b cmp -s - "$2"
}
$b dd if=/dev/urandom of=/random bs=64k count=96 2>/dev/null
$b dd if=/dev/zero of=/zeros bs=64k count=96 2>/dev/null

[ "$($b cat /sys/block/vda/serial)" = first-disk ] && echo "claim serial: holds"
[ "$($b cat /sys/block/vdc/ro)" = 1 ] && echo "claim read-only: holds"
[ "$($b cat /sys/block/vdd/size)" = 32768 ] && echo "claim size: holds"
[ "$($b cat /sys/block/vda/queue/write_cache)" = "write back" ] && echo "claim flushes: holds"
[ "$($b ls -d /sys/block/vdd/mq/* | $b wc -l)" = 2 ] && echo "claim queues: holds"

for disk in vda vdb vdd; do
    $b dd if=/random of=/dev/$disk bs=64k seek=3 conv=fsync,notrunc 2>/dev/null
    claim "$disk-written" same /dev/$disk /random 96
done
for disk in vda vdb; do
    $b blkdiscard -o 196608 -l 6291456 /dev/$disk
    claim "$disk-discarded" same /dev/$disk /zeros 96
done
# Sectors, not pages: with direct I/O, and past the page cache.
$b dd if=/random of=/dev/vda bs=512 seek=1001 count=3 oflag=direct conv=notrunc 2>/dev/null
$b dd if=/random bs=512 count=3 of=/sectors 2>/dev/null
echo 3 > /proc/sys/vm/drop_caches
claim sectors eval '$b dd if=/dev/vda bs=512 skip=1001 count=3 2>/dev/null | $b cmp -s - /sectors'

echo "under load"
for round in 1 2 3 4 5 6 7 8; do
    for disk in vda vdb vdd; do
        $b dd if=/random of=/dev/$disk bs=64k seek=$((3 + round * 8)) conv=fsync,notrunc 2>/dev/null &
    done
    wait
done
echo 3 > /proc/sys/vm/drop_caches
for disk in vda vdb vdd; do
    claim "$disk-loaded" eval '$b dd if=/dev/$disk bs=64k skip=67 count=96 2>/dev/null | $b cmp -s - /random'
done
$b cat /random | $b md5sum | $b sed 's/ .*//; s/^/md5 /'
$b sync
$b poweroff -f
