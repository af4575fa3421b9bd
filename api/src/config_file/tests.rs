use super::*;
use crate::types::{MacAddr, TokenBucket};

fn parse_alone(document: &str) -> Result<Vec<Action>, String> {
    parse(document.as_bytes(), |path| panic!("reads {path:?}")).map_err(|error| error.to_string())
}

const BOOT: &str = r#""boot-source": {"kernel_image_path": "/k"}"#;

fn with(rest: &str) -> Result<Vec<Action>, String> {
    parse_alone(&format!("{{{BOOT}, {rest}}}"))
}

fn boot() -> Action {
    Action::PutBootSource(BootSource {
        kernel_image_path: "/k".into(),
        ..Default::default()
    })
}

#[test]
fn actions_come_in_the_order_they_are_carried_out() {
    let actions = with(
        r#"
        "serial": {"serial_out_path": "/s"},
        "vsock": {"guest_cid": 3, "uds_path": "/v"},
        "network-interfaces": [{"iface_id": "n", "host_dev_name": "tap0"}],
        "drives": [
            {"drive_id": "b", "is_root_device": false, "path_on_host": "/b", "is_read_only": true},
            {"drive_id": "a", "is_root_device": true, "path_on_host": "/a", "is_read_only": true}
        ],
        "cpu-config": {"kvm_capabilities": ["1"]},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
        "metrics": {"metrics_path": "/m"},
        "logger": {"log_path": "/l"}
        "#,
    )
    .unwrap();
    let kinds: Vec<_> = actions
        .iter()
        .map(|action| match action {
            Action::PutLogger(_) => "logger",
            Action::PutMetrics(_) => "metrics",
            Action::PutMachineConfig(_) => "machine",
            Action::PutCpuConfig(_) => "cpu",
            Action::PutBootSource(_) => "boot",
            Action::PutDrive(drive) => drive.drive_id.as_str(),
            Action::PutNetworkInterface(interface) => interface.iface_id.as_str(),
            Action::PutVsock(_) => "vsock",
            Action::PutSerial(_) => "serial",
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        kinds,
        [
            "logger", "metrics", "machine", "cpu", "boot", "b", "a", "n", "vsock", "serial"
        ]
    );
}

#[test]
fn errors_name_the_key() {
    for (rest, expected) in [
        (
            r#""drives": [{"drive_id": "a", "is_root_device": 1}]"#,
            "drives[0].is_root_device: invalid type",
        ),
        (
            r#""drives": [{"drive_id": "a"}]"#,
            "drives[0]: missing field `is_root_device`",
        ),
        (r#""drives": null"#, "drives: invalid type: null"),
        (
            r#""machine-config": {"vcpu_count": 1, "mem_size_mib": -1}"#,
            "machine-config.mem_size_mib: ",
        ),
        (
            r#""network-interfaces": [{"iface_id": "a", "host_dev_name": "t", "guest_mac": "x"}]"#,
            "network-interfaces[0].guest_mac: The provided MAC",
        ),
        (
            r#""cpu-config": {"msr_modifiers": [{"addr": "1", "bitmap": "0b1"}]}"#,
            "cpu-config.msr_modifiers[0].addr: ",
        ),
        (
            r#""cpu-config": 1"#,
            "cpu-config: invalid type: integer `1`, expected a CPU template or the path",
        ),
        (r#""balloon-device": {}"#, "unknown field `balloon-device`"),
        (r#""pmem": 3"#, "pmem: invalid type"),
    ] {
        let error = with(rest).unwrap_err();
        assert!(error.contains(expected), "{rest}: {error}");
    }
    assert!(
        parse_alone("{}")
            .unwrap_err()
            .contains("missing field `boot-source`")
    );
    assert!(parse_alone("").unwrap_err().contains("EOF"));
}

#[test]
fn what_is_not_offered_is_refused_by_name() {
    for key in [
        "balloon",
        "entropy",
        "memory-hotplug",
        "mmds-config",
        "pmem",
    ] {
        for nothing in ["null", "[]"] {
            assert_eq!(with(&format!(r#""{key}": {nothing}"#)), Ok(vec![boot()]));
        }
        for something in [r#"{}"#, r#"{"amount_mib": 1}"#, r#"[{"id": "a"}]"#] {
            let error = with(&format!(r#""{key}": {something}"#)).unwrap_err();
            assert!(
                error.starts_with(&format!("{key}: This VMM offers no ")),
                "{error}"
            );
        }
    }
}

#[test]
fn cpu_config_may_be_a_path() {
    let document = format!(r#"{{{BOOT}, "cpu-config": "/t.json"}}"#);
    let read = |content: &'static str| {
        parse(document.as_bytes(), move |path| {
            assert_eq!(path, Path::new("/t.json"));
            Ok(content.into())
        })
    };
    let actions = read(r#"{"kvm_capabilities": ["!5"]}"#).unwrap();
    assert!(
        matches!(&actions[0], Action::PutCpuConfig(config) if config.kvm_capabilities.len() == 1)
    );
    let error = read(r#"{"bogus": 1}"#).unwrap_err().to_string();
    assert!(
        error.contains("/t.json") && error.contains("bogus"),
        "{error}"
    );
}

#[test]
fn unreadable_files_are_named() {
    for path in ["/nonexistent/machine.json", "/"] {
        let error = load(Path::new(path)).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("Cannot read {path}: ")),
            "{error}"
        );
    }
    let error = load(Path::new("/dev/zero")).unwrap_err().to_string();
    assert!(
        error.contains("larger than the limit of 4194304 bytes"),
        "{error}"
    );
}

fn full() -> FullVmConfig {
    FullVmConfig {
        boot_source: BootSource {
            kernel_image_path: "/k".into(),
            initrd_path: None,
            boot_args: Some("quiet".into()),
        },
        drives: vec![Drive {
            drive_id: "root".into(),
            is_root_device: true,
            path_on_host: Some("/d".into()),
            is_read_only: Some(false),
            ..Default::default()
        }],
        machine_config: MachineConfig::default(),
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".into(),
            host_dev_name: "tap0".into(),
            guest_mac: Some(MacAddr([2, 0, 0, 0, 0, 1])),
            rx_rate_limiter: Some(crate::types::RateLimiter {
                bandwidth: Some(TokenBucket {
                    size: u64::MAX,
                    one_time_burst: None,
                    refill_time: 1,
                }),
                ops: None,
            }),
            ..Default::default()
        }],
        vsock: Some(Vsock {
            vsock_id: None,
            guest_cid: 3,
            uds_path: "/v".into(),
        }),
    }
}

#[test]
fn what_is_reported_is_a_configuration_file() {
    let FullVmConfig {
        boot_source,
        mut drives,
        machine_config,
        mut network_interfaces,
        vsock,
    } = full();
    let expected = vec![
        Action::PutMachineConfig(machine_config),
        Action::PutBootSource(boot_source),
        Action::PutDrive(drives.remove(0)),
        Action::PutNetworkInterface(network_interfaces.remove(0)),
        Action::PutVsock(vsock.unwrap()),
    ];
    assert_eq!(
        parse_alone(&serde_json::to_string(&full()).unwrap()),
        Ok(expected)
    );
}

#[test]
fn nothing_configured_is_reported_with_every_key() {
    assert_eq!(
        serde_json::to_value(FullVmConfig::default()).unwrap(),
        serde_json::json!({
            "balloon": null,
            "drives": [],
            "boot-source": {"kernel_image_path": "", "initrd_path": null, "boot_args": null},
            "cpu-config": null,
            "logger": null,
            "machine-config": {
                "vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false, "huge_pages": "None",
            },
            "metrics": null,
            "mmds-config": null,
            "network-interfaces": [],
            "vsock": null,
            "entropy": null,
            "pmem": [],
            "memory-hotplug": null,
        })
    );
}

proptest::proptest! {
    #[test]
    fn never_panics(
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        text in "\\{(\"(boot-source|drives|pmem|cpu-config|vsock)\": ?(\"a\"|1|null|\\[\\]|\\{\\}),?){0,4}\\}",
    ) {
        let _ = parse(&bytes, |_| Ok(Vec::new()));
        let _ = parse(text.as_bytes(), |_| Ok(Vec::new()));
    }
}
