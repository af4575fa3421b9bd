//! Bad input: each is refused by naming the value at fault, changes nothing and leaves nothing behind. The same table
//! goes through the API and, where there is a way to say it there, through a configuration file.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use lepton_tests::guest::{Entry, Program};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{Api, PATIENCE, Vmm, test};
use serde_json::{Value, json};

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[],
        [
            test!(refused_by_the_api),
            test!(refused_in_a_configuration_file).needs(Need::Kvm),
            test!(requests_that_are_no_requests),
            test!(bodies_at_the_limit_of_their_size),
            test!(what_only_a_configuration_file_can_say).needs(Need::Kvm),
            test!(a_start_without_a_kernel),
            test!(an_impossible_tap).needs(Need::Root),
        ],
    )
}

/// Method, path, body, and what the fault names. In bodies `{dir}` is a folder with the files of [`prepare`].
type Case = (&'static str, &'static str, &'static str, &'static str);

#[rustfmt::skip]
const CASES: &[Case] = &[
    // The kernel and what goes with it.
    ("PUT", "/boot-source", r#"{}"#, "kernel_image_path"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"/no/such/kernel"}"#, "/no/such/kernel"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"{dir}"}"#, "{dir}"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"/dev/zero"}"#, "/dev/zero"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"{dir}/pipe"}"#, "{dir}/pipe"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":""}"#, "kernel_image_path"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":7}"#, "kernel_image_path"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"{dir}/kernel","initrd_path":"/no/initrd"}"#, "/no/initrd"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"{dir}/kernel","initrd_path":"{dir}"}"#, "{dir}"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"{dir}/kernel","bootargs":"quiet"}"#, "bootargs"),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"{dir}/kernel","boot_args":"{long}"}"#, "boot_args"),
    ("PUT", "/boot-source", "{\"kernel_image_path\":\"{dir}/kernel\",\"boot_args\":\"a\\u0000b\"}", "boot_args"),
    ("PUT", "/boot-source", "{\"kernel_image_path\":\"{dir}/kernel\",\"boot_args\":\"caf\\u00e9\"}", "boot_args"),
    ("PUT", "/boot-source", "{\"kernel_image_path\":\"/no\\u0000/kernel\"}", "kernel_image_path"),
    // vCPUs and memory.
    ("PUT", "/machine-config", r#"{"vcpu_count":0,"mem_size_mib":128}"#, "vcpu_count 0"),
    ("PUT", "/machine-config", r#"{"vcpu_count":33,"mem_size_mib":128}"#, "33"),
    ("PUT", "/machine-config", r#"{"vcpu_count":256,"mem_size_mib":128}"#, "256"),
    ("PUT", "/machine-config", r#"{"vcpu_count":-1,"mem_size_mib":128}"#, "-1"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1.5,"mem_size_mib":128}"#, "1.5"),
    ("PUT", "/machine-config", r#"{"vcpu_count":3,"mem_size_mib":128,"smt":true}"#, "vcpu_count 3"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1}"#, "mem_size_mib"),
    ("PUT", "/machine-config", r#"{"mem_size_mib":128}"#, "vcpu_count"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":0}"#, "mem_size_mib 0"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":9223372036854775808}"#, "9223372036854775808"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":18446744073709551615}"#, "18446744073709551615"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":17592186044416}"#, "17592186044416"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":18446744073709551616}"#, "mem_size_mib"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":"128"}"#, "mem_size_mib"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":129,"huge_pages":"2M"}"#, "129"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128,"huge_pages":"1G"}"#, "1G"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128,"cpu_template":"T2"}"#, "T2"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128,"memory":1}"#, "memory"),
    ("PATCH", "/machine-config", r#"{"vcpu_count":0}"#, "vcpu_count 0"),
    ("PATCH", "/machine-config", r#"{"mem_size_mib":0}"#, "mem_size_mib 0"),
    // Drives.
    ("PUT", "/drives/d", r#"{"drive_id":"d","is_root_device":false}"#, "path_on_host"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/disk"}"#, "is_root_device"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"/no/disk","is_root_device":false}"#, "/no/disk"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}","is_root_device":false}"#, "{dir}"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/pipe","is_root_device":false}"#, "{dir}/pipe"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"/dev/null","is_root_device":false}"#, "/dev/null"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/empty","is_root_device":false}"#, "{dir}/empty"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/short","is_root_device":false}"#, "{dir}/short"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/loop","is_root_device":false}"#, "{dir}/loop"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/api.sock","is_root_device":false}"#, "api.sock"),
    ("PUT", "/drives/d", r#"{"drive_id":"e","path_on_host":"{dir}/disk","is_root_device":false}"#, "[e]"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":false,"io_engine":"Fast"}"#, "Fast"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":false,"cache_type":"None"}"#, "None"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":false,"readonly":true}"#, "readonly"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","socket":"{dir}/vhost.sock","is_root_device":false}"#, "vhost"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":true,"partuuid":"a b"}"#, "a b"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":false,"rate_limiter":{"ops":{"size":-1,"refill_time":1}}}"#, "-1"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":false,"rate_limiter":{"ops":{"size":1}}}"#, "refill_time"),
    ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":false,"rate_limiter":{"iops":{}}}"#, "iops"),
    ("PUT", "/drives", r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":false}"#, "ID"),
    ("PUT", "/drives/a.b", r#"{"drive_id":"a.b","path_on_host":"{dir}/disk","is_root_device":false}"#, "a.b"),
    ("PUT", "/drives/a%2Fb", r#"{"drive_id":"a/b","path_on_host":"{dir}/disk","is_root_device":false}"#, "a%2Fb"),
    ("PATCH", "/drives/d", r#"{"drive_id":"e"}"#, "[e]"),
    ("PATCH", "/drives/d", r#"{"drive_id":"d","is_read_only":true}"#, "is_read_only"),
    // Interfaces.
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n"}"#, "host_dev_name"),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"m","host_dev_name":"t"}"#, "[m]"),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n","host_dev_name":"a-name-longer-than-a-tap-can-have"}"#, "a-name-longer-than-a-tap-can-have"),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n","host_dev_name":""}"#, "host_dev_name"),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n","host_dev_name":"a/b"}"#, "a/b"),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n","host_dev_name":"t","guest_mac":"06:00:00:00:00"}"#, "06:00:00:00:00"),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n","host_dev_name":"t","guest_mac":"zz:00:00:00:00:01"}"#, "zz:00:00:00:00:01"),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n","host_dev_name":"t","mtu":70000}"#, "70000"),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n","host_dev_name":"t","queues":2}"#, "queues"),
    ("PUT", "/network-interfaces/a b", r#"{"iface_id":"a b","host_dev_name":"t"}"#, ""),
    // vsock.
    ("PUT", "/vsock", r#"{"uds_path":"{dir}/v.sock"}"#, "guest_cid"),
    ("PUT", "/vsock", r#"{"guest_cid":3}"#, "uds_path"),
    ("PUT", "/vsock", r#"{"guest_cid":2,"uds_path":"{dir}/v.sock"}"#, "2"),
    ("PUT", "/vsock", r#"{"guest_cid":0,"uds_path":"{dir}/v.sock"}"#, "0"),
    ("PUT", "/vsock", r#"{"guest_cid":4294967295,"uds_path":"{dir}/v.sock"}"#, "4294967295"),
    ("PUT", "/vsock", r#"{"guest_cid":4294967296,"uds_path":"{dir}/v.sock"}"#, "4294967296"),
    ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"{dir}/disk"}"#, "{dir}/disk"),
    ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"/no/such/folder/v.sock"}"#, "/no/such/folder/v.sock"),
    ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":""}"#, "uds_path"),
    ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"{dir}/{path}"}"#, "uds_path"),
    // Log, metrics, console, processor.
    ("PUT", "/logger", r#"{"log_path":"/no/such/folder/log"}"#, "/no/such/folder/log"),
    ("PUT", "/logger", r#"{"log_path":"{dir}"}"#, "{dir}"),
    ("PUT", "/logger", r#"{"level":"Loud"}"#, "Loud"),
    ("PUT", "/logger", r#"{"show_level":"yes"}"#, "show_level"),
    ("PUT", "/metrics", r#"{}"#, "metrics_path"),
    ("PUT", "/metrics", r#"{"metrics_path":"/no/such/folder/metrics"}"#, "/no/such/folder/metrics"),
    ("PUT", "/serial", r#"{"serial_out_path":"/no/such/folder/console"}"#, "/no/such/folder/console"),
    ("PUT", "/serial", r#"{"baud":9600}"#, "baud"),
    ("PUT", "/cpu-config", r#"{"cpuid_modifiers":[{"leaf":"1","subleaf":"0x0","flags":0,"modifiers":[]}]}"#, "leaf"),
    ("PUT", "/cpu-config", r#"{"cpuid_modifiers":[{"leaf":"0x77777777","subleaf":"0x0","flags":0,"modifiers":[]}]}"#, "0x77777777"),
    ("PUT", "/cpu-config", r#"{"msr_modifiers":[{"addr":"0x10","bitmap":"0b2"}]}"#, "'2'"),
    ("PUT", "/cpu-config", r#"{"kvm_capabilities":["999999"]}"#, "999999"),
    // Actions and states.
    ("PUT", "/actions", r#"{"action_type":"Explode"}"#, "Explode"),
    ("PUT", "/actions", r#"{}"#, "action_type"),
    ("PUT", "/actions", r#"{"action_type":"InstanceStart","payload":"x"}"#, "payload"),
    ("PATCH", "/vm", r#"{"state":"Stopped"}"#, "Stopped"),
    // What there is not.
    ("PUT", "/balloon", r#"{"amount_mib":1,"deflate_on_oom":true}"#, "balloon"),
    ("PUT", "/entropy", r#"{}"#, "entropy"),
    ("PUT", "/mmds", r#"{"a":"b"}"#, "metadata"),
    ("PUT", "/mmds/config", r#"{"network_interfaces":[]}"#, "metadata"),
    ("PUT", "/pmem/p", r#"{"id":"p","path_on_host":"x"}"#, "pmem"),
    ("PUT", "/hotplug/memory", r#"{"total_size_mib":1}"#, "hotplug"),
    // Snapshots: too early, or of what is not there.
    ("PUT", "/snapshot/create", r#"{"snapshot_path":"a","mem_file_path":"b"}"#, "before starting"),
    ("PUT", "/snapshot/create", r#"{"snapshot_path":"a"}"#, "mem_file_path"),
    ("PUT", "/snapshot/load", r#"{"snapshot_path":"a"}"#, "mem_backend"),
    ("PUT", "/snapshot/load", r#"{"snapshot_path":"a","mem_file_path":"b","mem_backend":{"backend_path":"b","backend_type":"File"}}"#, "mem_backend"),
    ("PUT", "/snapshot/load", r#"{"snapshot_path":"a","mem_backend":{"backend_path":"b","backend_type":"Ram"}}"#, "Ram"),
    ("PUT", "/no-such-thing", r#"{}"#, "/no-such-thing"),
    ("DELETE", "/drives/d", "", "DELETE"),
    ("POST", "/actions", r#"{"action_type":"InstanceStart"}"#, "POST"),
    ("GET", "/drives/d", "", "/drives/d"),
    ("GET", "/", r#"{"a":1}"#, "body"),
    ("PUT", "/machine-config", "", "PUT"),
    // JSON that is none, or not this.
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"#, "column"),
    ("PUT", "/machine-config", r#"[1,128]x"#, "column"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128} {}"#, "trailing"),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"vcpu_count":2,"mem_size_mib":128}"#, "vcpu_count"),
    ("PUT", "/machine-config", "null", "null"),
    ("PUT", "/machine-config", "{deep}", "column"),
];

/// Makes the files that the cases are about.
fn prepare(vmm_directory: &std::path::Path) {
    let path = |name: &str| vmm_directory.join(name);
    Program::tick().write(vmm_directory, Entry::Linux64);
    fs::write(path("disk"), [0; 4096]).expect("a file can be written");
    fs::write(path("empty"), "").expect("a file can be written");
    fs::write(path("short"), [0; 511]).expect("a file can be written");
    std::os::unix::fs::symlink("loop", path("loop")).expect("a link can be made");
    let mode = rustix::fs::Mode::from(0o600);
    let pipe = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), pipe, mode, 0).expect("a pipe can be made");
}

fn filled(text: &str, directory: &std::path::Path) -> String {
    text.replace("{dir}", directory.to_str().expect("a plain path"))
        .replace("{long}", &"a".repeat(2048))
        .replace("{path}", &"p".repeat(108))
        .replace("{deep}", &"[".repeat(10_000))
}

fn refused_by_the_api() {
    let (mut vmm, mut api) = prepared();
    let config = api.get("/vm/config");
    let mut open_files = vmm.open_files();
    let mut wrong = Vec::new();
    for (method, path, body, names) in CASES {
        let body = filled(body, vmm.directory());
        let names = filled(names, vmm.directory());
        let case = format!("{method} {path} {}", shortened(&body));
        let Ok((status, reply)) = api.try_request(method, path, &body) else {
            wrong.push(format!("{case}\n    was not answered"));
            (vmm, api) = prepared();
            open_files = vmm.open_files();
            continue;
        };
        let fault: Value = serde_json::from_str(&reply).unwrap_or_default();
        let message = fault["fault_message"].as_str().unwrap_or_default();
        if status != 400 || !message.contains(&names) {
            wrong.push(format!(
                "{case}\n    answered {status} {reply}\n    instead of 400 and {names:?}"
            ));
        }
        if reply.len() > 4096 {
            wrong.push(format!("{case}\n    answered {} bytes", reply.len()));
        }
        // After a request that could not be framed the connection is closed.
        if api.try_request("GET", "/", "").is_err() {
            api = vmm.api();
        }
        assert_eq!(api.state(), "Not started", "{case}");
        if !vmm.open_files_fall_to(open_files, &mut api) {
            let now = vmm.open_files();
            wrong.push(format!("{case}\n    left {} descriptors", now - open_files));
            open_files = now;
        }
        if api.get("/vm/config") != config {
            wrong.push(format!("{case}\n    changed the configuration"));
            (vmm, api) = prepared();
            open_files = vmm.open_files();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    vmm.terminate();
}

/// A VMM with the files of the cases in its directory.
fn prepared() -> (Vmm, Api) {
    let (vmm, api) = Vmm::with_api();
    prepare(vmm.directory());
    (vmm, api)
}

fn shortened(text: &str) -> String {
    text.chars().take(200).collect()
}

/// A configuration that boots a guest, with one part replaced by that of a case, letter by letter; nothing if there
/// is no way to say the case in a file.
fn with_part(path: &str, body: &str, kernel: &str) -> Option<String> {
    let part = path.split('/').nth(1).unwrap_or_default();
    let body = match part {
        "drives" | "network-interfaces" => format!("[{body}]"),
        "boot-source" | "machine-config" | "vsock" | "logger" | "metrics" | "serial"
        | "cpu-config" => body.to_owned(),
        _ => return None,
    };
    let mut parts = vec![format!("{}:{body}", json!(part))];
    if part != "boot-source" {
        let boot = json!({ "kernel_image_path": kernel });
        parts.push(format!("\"boot-source\":{boot}"));
    }
    Some(format!("{{{}}}", parts.join(",")))
}

/// Cases that only a request can be: its path is what is bad, or it has no body or no JSON, or a file may say `null` for
/// nothing.
fn is_of_a_request_alone((method, path, body, names): &Case) -> bool {
    let about_the_path = names.starts_with('[') || *names == "ID" || path.contains('%');
    let about_json = ["column", "trailing"].contains(names);
    *method != "PUT" || about_the_path || about_json || body.is_empty() || *body == "null"
}

fn refused_in_a_configuration_file() {
    let mut wrong = Vec::new();
    let mut tried = 0;
    for case in CASES.iter().filter(|case| !is_of_a_request_alone(case)) {
        let (_, path, body, names) = case;
        let builder = Vmm::builder();
        prepare(builder.directory());
        let directory = builder.directory().to_owned();
        let kernel = filled("{dir}/kernel", &directory);
        let Some(config) = with_part(path, &filled(body, &directory), &kernel) else {
            continue;
        };
        tried += 1;
        let file = directory.join("config.json");
        fs::write(&file, &config).expect("a file can be written");
        let builder = builder.arguments(["--config-file"]).arguments([file]);
        let vmm = builder.spawn();
        // What does not end was accepted: the guest runs for ever.
        if !vmm.has_ended_within(PATIENCE / 4) {
            wrong.push(format!("{} was accepted", shortened(&config)));
            continue;
        }
        // That no socket is left is checked for every end.
        let ended = vmm.wait();
        let names = filled(names, &directory);
        let one_line = ended.stderr.lines().count() == 1;
        if ended.status.code() != Some(152) || !one_line || !ended.stderr.contains(&names) {
            wrong.push(format!(
                "{}\n    {}, said {:?}\n    instead of status 152 and one line with {names:?}",
                shortened(&config),
                ended.status,
                ended.stderr
            ));
        }
    }
    assert!(tried > 50, "{tried} cases");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn what_only_a_configuration_file_can_say() {
    let boot = r#""boot-source":{"kernel_image_path":"{dir}/kernel"}"#;
    let disk = r#"{"drive_id":"d","path_on_host":"{dir}/disk","is_root_device":false}"#;
    let root = |id: &str| {
        format!(r#"{{"drive_id":"{id}","path_on_host":"{{dir}}/disk","is_root_device":true}}"#)
    };
    let mut wrong = Vec::new();
    for (config, names) in [
        (String::new(), "EOF"),
        ("{}".to_owned(), "boot-source"),
        ("nonsense".to_owned(), "config.json"),
        (format!("{{{boot},\"machine\":{{}}}}"), "machine"),
        (format!("{{{boot},\"drives\":{{}}}}"), "drives"),
        (format!("{{{boot},\"drives\":[{disk},{disk}]}}"), "\"d\""),
        (
            format!("{{{boot},\"drives\":[{},{}]}}", root("a"), root("b")),
            "root",
        ),
        (
            format!("{{{boot},\"balloon\":{{\"amount_mib\":1}}}}"),
            "balloon",
        ),
        (format!("{{{boot},\"mmds-config\":{{}}}}"), "mmds-config"),
        (
            format!("{{{boot},\"cpu-config\":\"/no/such/template\"}}"),
            "/no/such/template",
        ),
    ] {
        let builder = Vmm::builder();
        prepare(builder.directory());
        let config = filled(&config, builder.directory());
        let file = builder.directory().join("config.json");
        fs::write(&file, &config).expect("a file can be written");
        let vmm = builder
            .arguments(["--config-file"])
            .arguments([file])
            .spawn();
        if !vmm.has_ended_within(PATIENCE / 4) {
            wrong.push(format!("{config} was accepted"));
            continue;
        }
        let ended = vmm.wait();
        let one_line = ended.stderr.lines().count() == 1;
        if ended.status.code() != Some(152) || !one_line || !ended.stderr.contains(names) {
            wrong.push(format!(
                "{config}\n    {}, said {:?}, not {names:?}",
                ended.status, ended.stderr
            ));
        }
    }
    for (path, reason) in [
        ("/no/such/file", "/no/such/file"),
        ("/", "/"),
        ("/dev/zero", "/dev/zero"),
    ] {
        let ended = Vmm::builder()
            .arguments(["--config-file", path])
            .spawn()
            .wait();
        let one_line = ended.stderr.lines().count() == 1;
        if ended.status.code() != Some(152) || !one_line || !ended.stderr.contains(reason) {
            wrong.push(format!(
                "--config-file {path}: {}, said {:?}",
                ended.status, ended.stderr
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn requests_that_are_no_requests() {
    let (vmm, mut api) = Vmm::with_api();
    let open_files = vmm.open_files();
    let head = |lines: &str| format!("PUT /machine-config HTTP/1.1\r\n{lines}\r\n\r\n");
    for (bytes, names) in [
        ("nonsense\r\n\r\n".to_owned(), "HTTP"),
        ("GET / HTTP/9.9\r\n\r\n".to_owned(), "HTTP"),
        (head("Content-Length: many"), "many"),
        (head("Content-Length: -1"), "-1"),
        (
            head("Content-Length: 99999999999999999999999"),
            "99999999999999999999999",
        ),
        (head("Content-Length: 51201"), "51201"),
        (
            head("Content-Length: 18446744073709551615"),
            "18446744073709551615",
        ),
        (
            head("Content-Length: 2\r\nContent-Length: 3"),
            "Content-Length",
        ),
        (head("Transfer-Encoding: chunked"), "chunked"),
        (head(&format!("X: {}", "x".repeat(9000))), "8192"),
        (head(&"X: y\r\n".repeat(100)), "HTTP"),
    ] {
        let mut stream = UnixStream::connect(vmm.socket()).expect("the API listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.write_all(bytes.as_bytes()).expect("a write");
        let mut reply = String::new();
        stream
            .read_to_string(&mut reply)
            .expect("a reply and an end");
        let case = shortened(&bytes);
        assert!(reply.starts_with("HTTP/1.1 400"), "{case}: {reply}");
        assert!(reply.contains(names), "{case}: {reply}");
        assert_eq!(api.state(), "Not started");
    }
    let closed = vmm.open_files_fall_to(open_files, &mut api);
    assert!(closed, "connections are left open");
    vmm.terminate();
}

fn bodies_at_the_limit_of_their_size() {
    let body = |bytes: usize| {
        let json = r#"{"vcpu_count":1,"mem_size_mib":128}"#;
        format!("{json}{}", " ".repeat(bytes - json.len()))
    };
    let check = |vmm: &Vmm, limit: usize| {
        let (status, reply) = vmm.api().request("PUT", "/machine-config", &body(limit));
        assert_eq!(status, 204, "{limit} bytes: {reply}");
        let message = vmm
            .api()
            .refused("PUT", "/machine-config", &body(limit + 1));
        assert!(message.contains(&(limit + 1).to_string()), "{message}");
        assert!(message.contains(&limit.to_string()), "{message}");
    };
    let (vmm, _) = Vmm::with_api();
    check(&vmm, 51_200);
    vmm.terminate();
    let vmm = Vmm::builder()
        .arguments(["--http-api-max-payload-size", "100"])
        .spawn();
    check(&vmm, 100);
    vmm.terminate();
}

fn a_start_without_a_kernel() {
    let (vmm, mut api) = Vmm::with_api();
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    let message = api.refused("PUT", "/actions", &start);
    assert!(message.contains("boot-source"), "{message}");
    assert_eq!(api.state(), "Not started");
    vmm.terminate();
}

fn an_impossible_tap() {
    // Root may make any tap, so what is refused is what is no tap.
    let (vmm, mut api): (Vmm, Api) = Vmm::with_api();
    let open_files = vmm.open_files();
    let body = json!({ "iface_id": "n", "host_dev_name": "lo" }).to_string();
    let message = api.refused("PUT", "/network-interfaces/n", &body);
    assert!(message.contains("lo"), "{message}");
    assert_eq!(vmm.open_files(), open_files);
    vmm.terminate();
}
