# The lab's first process once the root is there: runs the command, and reports its exit status.
. /run/lab/config
busybox() {
	/run/lab/busybox "$@"
}

busybox mkdir -p /dev/pts /dev/shm /sys/fs/cgroup
busybox mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
busybox mount -t tmpfs shm /dev/shm
busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
busybox ln -s /proc/self/fd /dev/fd
busybox ln -s /proc/self/fd/0 /dev/stdin
busybox ln -s /proc/self/fd/1 /dev/stdout
busybox ln -s /proc/self/fd/2 /dev/stderr
busybox ip link set lo up
busybox hostname lab
ulimit -n 65536

# A guest that is never run. KVM patches its own code when the first guest with its interrupt controller switched off comes, as
# each is at its start, and when the last has gone (static keys). QEMU was seen to run what stood there in between, a breakpoint,
# for ever after: a processor of the lab then does nothing else, and with it the lab. As long as this one is there, nothing is
# patched. It is there when the first process has ended: /dev/kvm, KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU.
[ "$lab_root" != host ] || perl -e '
	open(my $kvm, "+<", "/dev/kvm") or exit;
	open(my $vm, "+<&=", ioctl($kvm, 0xae01, 0) + 0) or die;
	ioctl($vm, 0xae60, 0) or die;
	open(my $vcpu, "+<&=", ioctl($vm, 0xae41, 0) + 0) or die;
	fork or sleep;
' </dev/null 2>/dev/console

now() {
	busybox sed -n 's/^now at \([0-9]*\) nsecs$/\1/p;/^now at/q' /proc/timer_list
}

# The report: a line to the host when the command starts and one when it has ended.
# From the host, on the same wire: the terminal's size when it changes.
[ "$lab_root" = host ] || for port in $lab_out $lab_err $lab_report; do
	busybox stty -F "$port" raw -echo
done
exec 9<>"$lab_report"

if [ "$lab_terminal" = yes ]; then
	tty=/dev/hvc0
	# Kept open: a terminal that nobody has open forgets its size.
	exec 8<>$tty
	busybox stty -F $tty rows "$lab_rows" cols "$lab_columns"
	while read -r rows columns <&9; do
		busybox stty -F $tty rows "$rows" cols "$columns"
	done &
	echo "start $(now)" >&9
	# In the foreground: a shell makes what it runs in the background deaf to Ctrl-C.
	/run/lab/busybox setsid -c /run/lab/busybox sh /run/lab/command <$tty >$tty 2>&1 8<&- 9<&-
	status=$?
else
	# Through fifos, not the ports themselves: a port can be opened once only, and a command may open /dev/stderr again.
	busybox mkfifo /run/lab/in /run/lab/out /run/lab/err
	if [ -n "$lab_in" ]; then
		busybox cat "$lab_in" 9<&- >/run/lab/in &
	else
		: 9<&- >/run/lab/in &
	fi
	busybox cat /run/lab/out >"$lab_out" 9<&- &
	out=$!
	busybox cat /run/lab/err >"$lab_err" 9<&- &
	err=$!
	echo "start $(now)" >&9
	/run/lab/busybox setsid /run/lab/busybox sh /run/lab/command \
		</run/lab/in >/run/lab/out 2>/run/lab/err 9<&-
	status=$?
	end=$(now)
	# What the command left running holds its output open: the lab ends with the command.
	for process in /proc/[0-9]*; do
		process=${process#/proc/}
		case $process in
		1 | $$ | "$out" | "$err") ;;
		*) kill -9 "$process" 2>/dev/null ;;
		esac
	done
	wait "$out" "$err"
fi
[ -z "$lab_sync" ] || busybox sync
echo "exit $status ${end:-$(now)}" >&9
# The host ends the machine on that line. Not within a minute: it is gone.
busybox sleep 60
busybox poweroff -f
