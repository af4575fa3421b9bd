#!/bin/sh
# The lab's first process until the root is there. Runs from the initramfs under busybox.
export PATH=/bin
mount -t devtmpfs dev /dev
exec </dev/null >/dev/console 2>&1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for module in /modules/*; do
	insmod "$module" || echo "lab: cannot load $module"
done
# Only now: see the kernel's command line.
for processor in /sys/devices/system/cpu/cpu[1-9]*/online; do
	[ ! -e "$processor" ] || echo 1 >"$processor"
done
processors=$(cat /sys/devices/system/cpu/online)
# This process and so all others: none on the first.
[ "$processors" = 0 ] || taskset -pc "1-${processors#0-}" $$ >/dev/null
fail() {
	echo "lab: $*"
	poweroff -f
}

# $1 ro|rw, $2 folder of the host
share() {
	mkdir -p "/root$2"
	mount -o bind "/host$2" "/root$2" || fail "cannot share $2"
	[ "$1" = rw ] || mount -o remount,bind,ro "/root$2" || fail "cannot share $2 read-only"
}

. /lab/config
if [ "$lab_root" = host ]; then
	mount -t virtiofs -o "$lab_export" host /host || fail "cannot mount the host's files"
	mount -t tmpfs -o mode=755 writes /writes || fail "cannot mount the overlay's upper layer"
	mkdir /writes/upper /writes/work
	mount -t overlay -o lowerdir=/host,upperdir=/writes/upper,workdir=/writes/work root /root ||
		fail "cannot mount the overlay"
	if [ -d "/host$lab_modules" ]; then
		mkdir -p "/root/lib/modules/$(uname -r)"
		mount -o bind "/host$lab_modules" "/root/lib/modules/$(uname -r)"
	fi
	lab_shares
	cd /root
	mkdir -p dev proc sys run tmp
	mount -o move /dev dev
	mount -o move /proc proc
	mount -o move /sys sys
	mount -t tmpfs -o mode=755 run run
	cp -a /lab run/lab
	cp /bin/busybox run/lab/busybox
	exec switch_root /root /run/lab/busybox sh /run/lab/start.sh
fi
mkdir /run /tmp
mv /lab /run/lab
ln -s /bin/busybox /run/lab/busybox
exec sh /run/lab/start.sh
