use super::*;
use crate::types::VmState;

fn fault(method: &str, target: &str, body: &str) -> String {
    let fault = route(method, target, body.as_bytes()).unwrap_err();
    assert_eq!(fault.status, 400);
    fault.message
}

#[test]
fn paths_without_a_body() {
    for (target, action) in [
        ("/", Action::GetInstanceInfo),
        ("/version", Action::GetVersion),
        ("/version/", Action::GetVersion),
        ("http://localhost/version", Action::GetVersion),
        ("http://localhost/", Action::GetInstanceInfo),
        ("/machine-config", Action::GetMachineConfig),
        ("/metrics", Action::GetMetrics),
        ("/vm/config", Action::GetVmConfig),
        ("/vm/divergence", Action::GetDivergence),
    ] {
        assert_eq!(route("GET", target, b""), Ok(action), "{target}");
        assert_eq!(
            fault("GET", target, "{}"),
            "GET request cannot have a body."
        );
    }
}

#[test]
fn actions() {
    for (name, action) in [
        ("FlushMetrics", Action::FlushMetrics),
        ("InstanceStart", Action::InstanceStart),
        ("SendCtrlAltDel", Action::SendCtrlAltDel),
    ] {
        let body = format!(r#"{{"action_type": "{name}"}}"#);
        assert_eq!(route("PUT", "/actions", body.as_bytes()), Ok(action));
    }
    let message = fault("PUT", "/actions", r#"{"action_type": "Halt"}"#);
    assert!(
        message.starts_with(
            "An error occurred when deserializing the json body of a request: action_type: unknown variant `Halt`"
        ),
        "{message}"
    );
    assert_eq!(
        route("PATCH", "/vm", br#"{"state": "Resumed"}"#),
        Ok(Action::PatchVm(VmStateChange {
            state: VmState::Resumed
        }))
    );
}

#[test]
fn a_drive_is_reset_by_its_path() {
    let reset = |id: &str| Ok(Action::ResetDrive(id.to_owned()));
    assert_eq!(route("PUT", "/drives/a_1/reset", b""), reset("a_1"));
    assert_eq!(route("PUT", "/drives/reset/reset/", b""), reset("reset"));
    assert_eq!(
        fault("PUT", "/drives/a/reset", "{}"),
        "PUT request cannot have a body."
    );
    assert_eq!(
        fault("PUT", "/drives//reset", ""),
        "The ID cannot be empty."
    );
    assert!(fault("PUT", "/drives/a!/reset", "").contains("a!"));
    for target in ["/drives/a/b/reset", "/drives/a/resets", "/drives/a/set"] {
        assert!(fault("PUT", target, "").starts_with("Invalid request method"));
    }
    // A drive may be called so.
    let drive = r#"{"drive_id": "reset", "is_root_device": false}"#;
    let put = route("PUT", "/drives/reset", drive.as_bytes());
    assert!(matches!(put, Ok(Action::PutDrive(_))), "{put:?}");
}

#[test]
fn unknown_requests_are_named() {
    for (method, target) in [
        ("GET", "/nothing"),
        ("GET", "nothing"),
        ("GET", "*"),
        ("GET", "http://localhost"),
        ("GET", "/vm"),
        ("GET", "/version/x"),
        ("GET", "/?a=b"),
        ("PUT", "/version"),
        ("POST", "/actions"),
        ("get", "/version"),
        ("DELETE", "/drives/a"),
        ("PUT", "/drives/a/b"),
        ("PUT", "/drivesa"),
    ] {
        assert_eq!(
            fault(method, target, ""),
            format!("Invalid request method and/or path: {method} {target}.")
        );
    }
}

#[test]
fn a_body_is_required() {
    for row in ROUTES.iter().filter(|row| row.schema.is_some()) {
        let method = row.method.as_str();
        let target = row.pattern.replace(['{', '}'], "");
        assert_eq!(
            fault(method, &target, ""),
            format!("Empty {method} request."),
            "{target}"
        );
        let message = fault(method, &target, "{");
        assert!(message.contains("EOF while parsing an object"), "{message}");
        let message = fault(method, &target, "null");
        assert!(message.contains("invalid type: null"), "{message}");
        let message = fault(method, &target, r#"{"bogus": 1}"#);
        assert!(message.contains("unknown field `bogus`"), "{message}");
    }
    assert_eq!(
        fault("PATCH", "/machine-config", "{}"),
        "Empty PATCH request."
    );
}

#[test]
fn ids_of_path_and_body_agree() {
    for (method, collection, rest) in [
        ("PUT", "/drives", r#""is_root_device": false"#),
        ("PATCH", "/drives", r#""path_on_host": "/x""#),
        ("PUT", "/network-interfaces", r#""host_dev_name": "tap0""#),
        ("PATCH", "/network-interfaces", r#""rx_rate_limiter": null"#),
    ] {
        let key = if collection == "/drives" {
            "drive_id"
        } else {
            "iface_id"
        };
        let body = format!(r#"{{"{key}": "a_1-B", {rest}}}"#);
        assert!(route(method, &format!("{collection}/a_1-B"), body.as_bytes()).is_ok());
        assert_eq!(
            fault(method, &format!("{collection}/other"), &body),
            "The id from the path [other] does not match the id from the body [a_1-B]!"
        );
        assert_eq!(fault(method, collection, &body), "The ID cannot be empty.");
        assert_eq!(
            fault(method, &format!("{collection}/"), &body),
            "The ID cannot be empty."
        );
        for bad in ["a%20b", "..", "a.b", "é"] {
            let message = fault(method, &format!("{collection}/{bad}"), &body);
            assert!(
                message.starts_with("API Resource IDs can only contain"),
                "{message}"
            );
            assert!(message.contains(bad), "{message}");
        }
    }
}

#[test]
fn what_is_not_offered_says_why() {
    for target in [
        "/balloon",
        "/balloon/statistics",
        "/balloon/hinting/start",
        "/entropy",
        "/hotplug/memory",
        "/mmds",
        "/mmds/config",
        "/pmem/a",
    ] {
        for (method, body) in [("GET", ""), ("PUT", "{}"), ("PATCH", "{}")] {
            let message = fault(method, target, body);
            assert!(
                message.starts_with(&format!("{target}: This VMM offers no ")),
                "{message}"
            );
        }
    }
    assert!(fault("GET", "/balloons", "").starts_with("Invalid request method"));
}

#[test]
fn deprecated_fields_are_told() {
    let vsock = |body: &[u8]| route("PUT", "/vsock", body).unwrap().deprecated_field();
    assert_eq!(
        vsock(br#"{"vsock_id": "a", "guest_cid": 3, "uds_path": "/v"}"#),
        Some("vsock_id")
    );
    assert_eq!(vsock(br#"{"guest_cid": 3, "uds_path": "/v"}"#), None);
    let patch = route("PATCH", "/machine-config", br#"{"cpu_template": "T2"}"#).unwrap();
    assert_eq!(patch.deprecated_field(), Some("cpu_template"));
}

#[test]
fn any_memory_size_is_carried_as_it_is() {
    let body = br#"{"vcpu_count": 1, "mem_size_mib": 9223372036854775808}"#;
    let Ok(Action::PutMachineConfig(config)) = route("PUT", "/machine-config", body) else {
        panic!("refused");
    };
    assert_eq!(config.mem_size_mib, 1 << 63);
    for size in ["-1", "1.5", "18446744073709551616", "\"1\""] {
        let body = format!(r#"{{"vcpu_count": 1, "mem_size_mib": {size}}}"#);
        let message = fault("PUT", "/machine-config", &body);
        assert!(message.contains("mem_size_mib: "), "{message}");
    }
}

proptest::proptest! {
    #[test]
    fn never_panics(
        method in "GET|PUT|PATCH|[A-Z]{0,8}",
        target in "(http://)?[ -~é]{0,20}|/(drives|network-interfaces|vm|metrics|balloon)/?[a-z/{}]{0,6}",
        body in "[ -~]{0,64}|\\{(\"(drive_id|iface_id|size|state)\": ?(\"a\"|1|null|\\[\\]),?){0,4}\\}",
    ) {
        let _ = route(&method, &target, body.as_bytes());
    }
}
