//! What a container engine asks of a host's kernel, asked of our guest's: a container by Debian's `runc`, a network for it by
//! `ip` and `nft`.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};

use lepton_agent::client::ExitStatus;
use lepton_tests::linux::{self, Linux, drive};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::tap::Tap;
use lepton_tests::{PATIENCE, carried, test};
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &linux::NEEDS,
        [test!(a_container_runs_confined_and_has_a_network)
            .of_every_origin()
            .needs(Need::Root)
            .needs(Need::Program("ip"))
            .needs(Need::Program("ldd"))
            .needs(Need::Program("mkfs.ext4"))
            .needs(Need::Program("nft"))
            .needs(Need::Program("runc"))],
    )
}

const HOST: &str = "172.30.79.1";
const GUEST: &str = "172.30.79.2";
/// The container's own address, in a network that the host does not know.
const BOX: &str = "10.77.0.2";

/// The container's network, whose other end is a bridge, and an overlay for its root: its lower layer is on the drive, which is read-only.
const SET_UP: &str = "
    set -e
    ip() {
        /mnt/bin/ip \"$@\"
    }
    ln -sfn /run /var/run
    ip netns add box
    ip link add br0 type bridge
    ip addr add 10.77.0.1/24 dev br0
    ip link add veth0 type veth peer name eth0 netns box
    ip link set veth0 master br0
    ip link set veth0 up
    ip link set br0 up
    ip -n box link set lo up
    ip -n box addr add 10.77.0.2/24 dev eth0
    ip -n box link set eth0 up
    ip -n box route add default via 10.77.0.1
    echo 1 > /proc/sys/net/ipv4/ip_forward
    mkdir -p /run/upper /run/work /run/bundle/rootfs
    mkdir -p /run/upper/bin /run/upper/proc /run/upper/dev /run/upper/sys
    mount -t overlay -o lowerdir=/mnt/layer,upperdir=/run/upper,workdir=/run/work overlay /run/bundle/rootfs
    cp /bin/busybox /run/bundle/rootfs/bin
    chown -R 100000:100000 /run/bundle/rootfs
    mknod -m 666 /dev/data b $(tr : ' ' < /sys/block/vdc/dev)
    cat > /run/bundle/config.json
";

/// Who comes from the container goes as the guest, to one port only; who comes to the guest's port 8080 goes to the container.
fn rules(port: u16) -> String {
    format!(
        "table inet engine {{
             set ports {{ type inet_service; elements = {{ {port} }} }}
             chain to {{
                 type nat hook prerouting priority dstnat;
                 iifname eth0 tcp dport 8080 dnat ip to {BOX}:5000
             }}
             chain from {{
                 type nat hook postrouting priority srcnat;
                 oifname eth0 ip saddr 10.77.0.0/24 masquerade
             }}
             chain through {{
                 type filter hook forward priority filter; policy drop;
                 ct state established,related accept
                 ct status dnat accept
                 iifname br0 tcp dport @ports counter accept
                 limit rate 10/second counter reject with tcp reset
             }}
         }}"
    )
}

/// What runs in the container. Each line that it prints begins with a word of its own.
const SCRIPT: &str = r#"
    echo who $(id -u) $$ $(hostname) $(ls -d /proc/[0-9]* | wc -l)
    echo map $(cat /proc/self/uid_map)
    echo below $(cat /etc/below)
    echo overwritten > /etc/below && rm /etc/gone && echo above $(ls /etc) $(cat /etc/below)
    echo seccomp $(mkdir /etc/x 2>&1)
    echo device $(dd if=/dev/zero of=/dev/data bs=512 count=1 2>&1)
    cd /sys/fs/cgroup
    echo controllers $(cat cgroup.controllers)
    dd if=/dev/zero of=/dev/null bs=100M count=1 2>/dev/null
    echo memory $? $(grep '^oom_kill ' memory.events)
    nest() { (nest); return $?; }
    nest 2>/dev/null
    echo pids $(cat pids.events)
    i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done
    echo cpu $(grep nr_throttled cpu.stat)
    before=$(cut -d. -f1 /proc/uptime)
    dd if=/dev/data of=/dev/null bs=64k 2>/dev/null
    echo io $before $(cut -d. -f1 /proc/uptime)
    echo open $(nc -w 30 $HOST $OPEN </dev/null)
    echo shut $(nc -w 30 $HOST $SHUT </dev/null 2>&1)
    echo from the box | nc -l -p 5000
"#;

/// The container, as the specification of runtimes (OCI, 1.0) has it. It may read from one device, at 1 MiB a second.
fn container(environment: [String; 4], device: (u32, u32)) -> Value {
    let kinds = ["pid", "mount", "uts", "ipc", "user", "cgroup"];
    let mut namespaces: Vec<Value> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
    namespaces.push(json!({ "type": "network", "path": "/run/netns/box" }));
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    let (major, minor) = device;
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "hostname": "box",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/busybox", "sh", "-c", SCRIPT],
            "env": environment,
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup" },
        ],
        "linux": {
            "namespaces": namespaces,
            "uidMappings": map,
            "gidMappings": map,
            "devices": [{ "path": "/dev/data", "type": "b", "major": major, "minor": minor }],
            "cgroupsPath": "/engine/box",
            "resources": {
                "devices": [
                    { "allow": false, "access": "rwm" },
                    { "allow": true, "type": "b", "major": major, "minor": minor, "access": "r" },
                ],
                "memory": { "limit": 24 << 20 },
                "pids": { "limit": 20 },
                "cpu": { "quota": 80_000, "period": 100_000 },
                "blockIO": {
                    "throttleReadBpsDevice": [{ "major": major, "minor": minor, "rate": 1 << 20 }],
                },
            },
            // ENOTBLK: nothing else makes mkdir fail with it.
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 15 }],
            },
        },
    })
}

/// Listens on a port of the host, returned, and tells each who connects from which address they come. `heard` hears of each.
#[track_caller]
fn tells_addresses(heard: Sender<()>) -> u16 {
    let listener = TcpListener::bind((HOST, 0)).expect("the tap has that address");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            // Who does not wait for the answer is not told.
            let _ = writeln!(stream, "{}", from.ip());
            let _ = heard.send(());
        }
    });
    port
}

/// The number at the end of a line.
#[track_caller]
fn last_number(line: &str) -> u64 {
    let word = line.rsplit(' ').next().expect("a word");
    word.parse()
        .unwrap_or_else(|_| panic!("no number at the end of {line:?}"))
}

fn a_container_runs_confined_and_has_a_network() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let tree = folder.path().join("tree");
    carried::carry(&tree, &["ip", "nft", "runc"]);
    for (name, content) in [("below", "the lower layer"), ("gone", "")] {
        fs::create_dir_all(tree.join("layer/etc")).expect("a folder");
        fs::write(tree.join("layer/etc").join(name), content).expect("a file");
    }
    let image = carried::image(&tree);
    let tap = Tap::new(Some(&format!("{HOST}/24")));
    let ip = format!("quiet ip={GUEST}::{HOST}:255.255.255.0::eth0:off");
    let guest = Linux::boot(&ip, |vmm, config| {
        config["machine-config"]["mem_size_mib"] = 256.into();
        config["machine-config"]["vcpu_count"] = 2.into();
        config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": tap.name() }]);
        let data = vmm.sparse_file("data", 3 << 20);
        let drives = config["drives"].as_array_mut().expect("a list");
        drives.push(drive("tools", &image, "Sync", true));
        drives.push(drive("data", Path::new(&data), "Sync", false));
    });
    carried::mount(&guest, "ro");
    let device = guest.sh("cat /sys/block/vdc/dev");
    let (major, minor) = device.split_once(':').expect("two numbers");
    let device = [major, minor].map(|number| number.parse().expect("a number"));

    let (heard, comes) = channel();
    let open = tells_addresses(heard.clone());
    let shut = tells_addresses(heard.clone());
    let environment = [
        "PATH=/bin".to_owned(),
        format!("HOST={HOST}"),
        format!("OPEN={open}"),
        format!("SHUT={shut}"),
    ];
    let bundle = container(environment, device.into()).to_string();
    for (script, input) in [(SET_UP, bundle), ("/mnt/bin/nft -f -", rules(open))] {
        let output = guest.run(script, input.as_bytes());
        assert_eq!(output.status, ExitStatus::Exited(0), "{output:?}");
    }

    let lines = std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            let run = "timeout 200 /mnt/bin/runc run --bundle /run/bundle box >/tmp/lines 2>&1";
            let status = guest.start(run).wait();
            let _ = heard.send(());
            let lines = guest.sh("cat /tmp/lines");
            assert!(matches!(status, Ok(ExitStatus::Exited(0))), "{lines}");
            lines
        });
        // Once it has talked to the host it listens, or it has ended.
        comes.recv_timeout(4 * PATIENCE).expect("it does something");
        let mut told = String::new();
        while !run.is_finished() {
            if let Ok(mut stream) = TcpStream::connect((GUEST, 8080)) {
                stream.read_to_string(&mut told).expect("all of it");
                break;
            }
        }
        let mut lines = run.join().expect("the container ends");
        lines.push_str("\ntold ");
        lines.push_str(told.trim_end());
        lines
    });
    let line = |word: &str| {
        let mut found = lines.lines().filter_map(|line| line.strip_prefix(word));
        let line = found.next().and_then(|line| line.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {word} in {lines}"))
    };
    // Namespaces: it is root, the first process of few, with a name of its own, and somebody else outside.
    assert!(line("who").starts_with("0 1 box "), "{lines}");
    assert!(last_number(line("who")) < 6, "{lines}");
    assert_eq!(line("map"), "0 100000 65536");
    // The overlay: what it changes is above.
    assert_eq!(line("below"), "the lower layer");
    assert_eq!(line("above"), "below overwritten");
    let changed = "cat /run/upper/etc/below /mnt/layer/etc/below; ls /mnt/layer/etc";
    assert_eq!(guest.sh(changed), "overwritten\nthe lower layerbelow\ngone");
    assert!(line("seccomp").contains("Block device required"), "{lines}");
    // Control groups: the device may be read only, and every limit has been felt.
    assert!(
        line("device").contains("Operation not permitted"),
        "{lines}"
    );
    for controller in ["cpu", "io", "memory", "pids"] {
        let mut all = line("controllers").split(' ');
        assert!(all.any(|name| name == controller), "{lines}");
    }
    assert_eq!(line("memory"), "137 oom_kill 1");
    assert!(last_number(line("pids")) > 0, "{lines}");
    assert!(last_number(line("cpu")) > 0, "{lines}");
    let (before, after) = line("io").split_once(' ').expect("two numbers");
    assert!(
        last_number(after) >= last_number(before) + 2,
        "3 MiB at 1 MiB/s: {lines}"
    );
    // The network: its packets carry the guest's address, and go where the rules let them.
    assert_eq!(line("open"), GUEST);
    assert!(line("shut").contains("Connection refused"), "{lines}");
    assert_eq!(line("told"), "from the box");
    let counted = guest.sh("/mnt/bin/nft list chain inet engine through | grep -c 'packets [1-9]'");
    assert_eq!(counted, "2");
    guest.shut_down();
}
