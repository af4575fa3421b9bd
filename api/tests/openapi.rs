//! `openapi.yaml` held to the table of routes, to the types that read the bodies, and to the specification it is
//! compatible with.
//!
//! The names of that specification stand in `data/firecracker.names`. Where the specification itself lies beside the
//! repository, in `../shared/peer-api/firecracker.yaml`, the list is checked against it;
//! `LEPTON_WRITE_NAMES=1 cargo test -p lepton-api --test openapi` writes it anew.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lepton_api::config_file::FullVmConfig;
use lepton_api::route::{ROUTES, route};
use lepton_api::types::*;
use lepton_api::{Action, Fault};
use saphyr::{LoadableYamlNode, ScalarOwned, YamlOwned};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const METHODS: [&str; 6] = ["get", "put", "patch", "post", "delete", "head"];

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// YAML with the expressiveness of JSON; the keys of `responses` may be numbers.
fn load(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap();
    let documents = YamlOwned::load_from_str(&text).unwrap();
    assert_eq!(documents.len(), 1);
    to_json(&documents[0])
}

fn to_json(yaml: &YamlOwned) -> Value {
    match yaml {
        YamlOwned::Value(ScalarOwned::Null) => Value::Null,
        YamlOwned::Value(ScalarOwned::Boolean(value)) => json!(value),
        YamlOwned::Value(ScalarOwned::Integer(value)) => json!(value),
        YamlOwned::Value(ScalarOwned::String(value)) => json!(value),
        YamlOwned::Sequence(items) => items.iter().map(to_json).collect(),
        YamlOwned::Mapping(entries) => entries
            .iter()
            .map(|(key, value)| match to_json(key) {
                Value::String(key) => (key, to_json(value)),
                key => (key.to_string(), to_json(value)),
            })
            .collect::<serde_json::Map<_, _>>()
            .into(),
        other => panic!("unexpected YAML: {other:?}"),
    }
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn strings(value: &Value) -> BTreeSet<&str> {
    let list = value.as_array().into_iter().flatten();
    list.map(|item| item.as_str().unwrap()).collect()
}

fn is_marked(value: &Value, mark: &str) -> bool {
    value[mark] == true
}

fn definition_of(reference: &Value) -> Option<&str> {
    reference["$ref"].as_str()?.strip_prefix("#/definitions/")
}

/// Form of a value: a definition, a list of something, an enumeration or a plain type.
fn form(schema: &Value) -> String {
    if let Some(name) = definition_of(schema) {
        return name.to_owned();
    }
    let kind = schema["type"].as_str().unwrap_or("?");
    if schema["items"].is_object() {
        return format!("{kind} of {}", form(&schema["items"]));
    }
    let variants = strings(&schema["enum"]);
    if variants.is_empty() {
        kind.to_owned()
    } else {
        format!("{kind} {}", Vec::from_iter(variants).join("|"))
    }
}

/// One line per operation, definition and property of a document.
///
/// `scope` is the document that says what is offered: paths it does not have and what it marks as its own addition
/// are left out, and of what it marks as not offered only the name remains.
fn names(document: &Value, scope: &Value) -> String {
    let mut lines = BTreeSet::new();
    let mut reachable = BTreeSet::new();
    for (path, operations) in entries(&document["paths"]) {
        for method in METHODS {
            let operation = &operations[method];
            let offered = &scope["paths"][path];
            if operation.is_null()
                || offered.is_null()
                || is_marked(&offered[method], "x-lepton-addition")
            {
                continue;
            }
            let mut line = format!("{} {path}", method.to_uppercase());
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let schema = definition_of(&parameter["schema"]);
                reachable.extend(schema);
                let required = match is_marked(parameter, "required") {
                    true => "required",
                    false => "optional",
                };
                line += &format!(
                    " {}={}:{required}",
                    parameter["in"].as_str().unwrap(),
                    schema.unwrap_or("string")
                );
            }
            for (status, response) in entries(&operation["responses"]) {
                let schema = response["$ref"]
                    .as_str()
                    .and_then(|pointer| document.pointer(pointer.strip_prefix('#')?))
                    .unwrap_or(response);
                let name = definition_of(&schema["schema"]);
                reachable.extend(name);
                line += &format!(" {status}={}", name.unwrap_or("none"));
            }
            lines.insert(line);
        }
    }
    let mut seen = BTreeSet::new();
    while let Some(name) = reachable.pop_first() {
        if !seen.insert(name) {
            continue;
        }
        let definition = &document["definitions"][name];
        let required = Vec::from_iter(strings(&definition["required"])).join(",");
        let mut line = format!("{name}: {}", form(definition));
        if !required.is_empty() {
            line += &format!(" required {required}");
        }
        lines.insert(line);
        for (property, schema) in entries(&definition["properties"]) {
            let offered = &scope["definitions"][name]["properties"][property];
            if is_marked(offered, "x-lepton-addition") {
                continue;
            }
            if is_marked(offered, "x-lepton-not-offered") {
                lines.insert(format!("{name}.{property}"));
                continue;
            }
            lines.insert(format!("{name}.{property}: {}", form(schema)));
            reachable.extend(definition_of(schema));
            reachable.extend(definition_of(&schema["items"]));
        }
    }
    Vec::from_iter(lines).join("\n") + "\n"
}

#[test]
fn names_are_those_of_the_specification() {
    let ours = load(&here("openapi.yaml"));
    let list = here("tests/data/firecracker.names");
    let specification = here("../../shared/peer-api/firecracker.yaml");
    if specification.exists() {
        let theirs = names(&load(&specification), &ours);
        if std::env::var_os("LEPTON_WRITE_NAMES").is_some() {
            std::fs::write(&list, &theirs).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(&list).unwrap(),
            theirs,
            "{list:?} is out of date"
        );
    }
    let theirs = std::fs::read_to_string(&list).unwrap();
    // Far fewer lines would mean that the list, or the walk through the documents, is broken.
    assert!(theirs.lines().count() > 80, "{theirs}");
    let ours = names(&ours, &ours);
    let (ours, theirs): (BTreeSet<_>, BTreeSet<_>) =
        (ours.lines().collect(), theirs.lines().collect());
    assert_eq!(ours, theirs);
}

#[test]
fn table_and_description_have_the_same_operations() {
    let document = load(&here("openapi.yaml"));
    let mut described = BTreeSet::new();
    for (path, operations) in entries(&document["paths"]) {
        for (method, operation) in entries(operations) {
            let body = operation["parameters"]
                .as_array()
                .into_iter()
                .flatten()
                .find_map(|parameter| definition_of(&parameter["schema"]));
            described.insert((method.to_uppercase(), path.as_str(), body));
        }
    }
    let served = ROUTES
        .iter()
        .map(|route| {
            (
                route.method.as_str().to_owned(),
                route.pattern,
                route.schema,
            )
        })
        .collect();
    assert_eq!(described, served);
    assert_eq!(described.len(), ROUTES.len(), "a row stands twice");
}

/// What a test does with the type behind a definition.
struct Checked {
    name: &'static str,
    /// A value with every field.
    sample: Value,
    read: fn(&Value) -> Result<Value, serde_json::Error>,
}

fn checked<T: Serialize + DeserializeOwned>(name: &'static str, sample: Value) -> Checked {
    Checked {
        name,
        sample,
        read: |value| serde_json::to_value(serde_json::from_value::<T>(value.clone())?),
    }
}

fn request_types() -> Vec<Checked> {
    let bucket = json!({"size": 10, "one_time_burst": 20, "refill_time": 30});
    let limiter = json!({"bandwidth": bucket, "ops": bucket});
    let register = json!({"register": "eax", "bitmap": "0b".to_owned() + &"x".repeat(32)});
    let leaf = json!({"leaf": "0x1", "subleaf": "0x2", "flags": 1, "modifiers": [register]});
    let msr = json!({"addr": "0x10", "bitmap": "0b".to_owned() + &"1".repeat(64)});
    let backend = json!({"backend_path": "/m", "backend_type": "Uffd", "verify": false});
    let tap = json!({"iface_id": "a", "host_dev_name": "tap0"});
    let socket = json!({"uds_path": "/v"});
    let overlay = json!({"path": "/o", "layers": ["/l"]});
    let image = json!({"drive_id": "a", "path_on_host": "/d", "overlay": overlay});
    let place = json!({"drive_id": "a", "path": "/o"});
    let addresses = json!({
        "iface_id": "a", "guest_mac": "06:00:ac:10:00:02", "address": "10.0.0.2/24", "gateway": "10.0.0.1",
    });
    let identity = json!({
        "hostname": "a", "machine_id": "00", "interfaces": [addresses], "timeout_ms": 1,
    });
    let child = json!({
        "adopt_socket": "/a", "network_overrides": [tap], "vsock_override": socket, "drive_overrides": [image],
        "overlays": [place], "identity": identity,
    });
    vec![
        checked::<BootSource>(
            "BootSource",
            json!({"kernel_image_path": "/k", "initrd_path": "/i", "boot_args": "quiet"}),
        ),
        checked::<CpuConfig>(
            "CpuConfig",
            json!({"kvm_capabilities": ["1", "!2"], "cpuid_modifiers": [leaf], "msr_modifiers": [msr]}),
        ),
        checked::<CpuidLeafModifier>("CpuidLeafModifier", leaf.clone()),
        checked::<CpuidRegisterModifier>("CpuidRegisterModifier", register.clone()),
        checked::<MsrModifier>("MsrModifier", msr.clone()),
        checked::<TokenBucket>("TokenBucket", bucket.clone()),
        checked::<RateLimiter>("RateLimiter", limiter.clone()),
        checked::<Drive>(
            "Drive",
            json!({
                "drive_id": "a", "partuuid": "1-2", "is_root_device": true, "cache_type": "Writeback",
                "is_read_only": true, "path_on_host": "/d", "rate_limiter": limiter, "io_engine": "Async",
                "socket": "/s", "overlay": overlay,
            }),
        ),
        checked::<DrivePatch>(
            "PartialDrive",
            json!({"drive_id": "a", "path_on_host": "/d", "rate_limiter": limiter}),
        ),
        checked::<NetworkInterface>(
            "NetworkInterface",
            json!({
                "iface_id": "a", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02", "mtu": 1500,
                "rx_rate_limiter": limiter, "tx_rate_limiter": limiter,
            }),
        ),
        checked::<NetworkInterfacePatch>(
            "PartialNetworkInterface",
            json!({"iface_id": "a", "rx_rate_limiter": limiter, "tx_rate_limiter": limiter}),
        ),
        checked::<Logger>(
            "Logger",
            json!({"log_path": "/l", "level": "Info", "show_level": true, "show_log_origin": true, "module": "m"}),
        ),
        checked::<MetricsTarget>(
            "Metrics",
            json!({"metrics_path": "/m", "emit_id": true, "properties": {"a": "b"}}),
        ),
        checked::<MachineConfig>(
            "MachineConfiguration",
            json!({
                "vcpu_count": 2, "mem_size_mib": 256, "smt": true, "cpu_template": "T2", "track_dirty_pages": true,
                "huge_pages": "2M", "clonable": true,
            }),
        ),
        checked::<Serial>(
            "SerialDevice",
            json!({"serial_out_path": "/s", "rate_limiter": bucket}),
        ),
        checked::<Vsock>(
            "Vsock",
            json!({"vsock_id": "v", "guest_cid": 3, "uds_path": "/v"}),
        ),
        checked::<SnapshotCreate>(
            "SnapshotCreateParams",
            json!({"snapshot_type": "Diff", "snapshot_path": "/s", "mem_file_path": "/m"}),
        ),
        checked::<SnapshotLoad>(
            "SnapshotLoadParams",
            json!({
                "snapshot_path": "/s", "mem_file_path": "/m", "mem_backend": backend, "enable_diff_snapshots": true,
                "track_dirty_pages": true, "resume_vm": true, "network_overrides": [tap], "vsock_override": socket,
                "drive_overrides": [image], "clock_realtime": true, "huge_pages": "2M",
                "identity": identity,
            }),
        ),
        checked::<CloneMachine>(
            "CloneParams",
            json!({"children": [child], "resume_children": false, "pool": "/p", "timeout_ms": 1}),
        ),
        checked::<CloneChild>("CloneChild", child.clone()),
        checked::<CloneOverlay>("CloneOverlay", place.clone()),
        checked::<MemoryBackend>("MemoryBackend", backend.clone()),
        checked::<NetworkOverride>("NetworkOverride", tap.clone()),
        checked::<VsockOverride>("VsockOverride", socket.clone()),
        checked::<DriveOverlay>("DriveOverlay", overlay.clone()),
        checked::<DriveOverride>("DriveOverride", image.clone()),
        checked::<Identity>("Identity", identity.clone()),
        checked::<IdentityInterface>("IdentityInterface", addresses.clone()),
        checked::<InstanceAction>(
            "InstanceActionInfo",
            json!({"action_type": "InstanceStart"}),
        ),
        checked::<VmStateChange>("Vm", json!({"state": "Paused"})),
    ]
}

fn keys(value: &Value) -> BTreeSet<&str> {
    entries(value).map(|(key, _)| key.as_str()).collect()
}

#[test]
fn types_and_description_have_the_same_fields() {
    let document = load(&here("openapi.yaml"));
    let mut bodies: BTreeSet<_> = ROUTES.iter().filter_map(|route| route.schema).collect();
    for Checked { name, sample, read } in request_types() {
        bodies.remove(name);
        let definition = &document["definitions"][name];
        let offered: BTreeSet<_> = entries(&definition["properties"])
            .filter(|(_, schema)| !is_marked(schema, "x-lepton-not-offered"))
            .map(|(property, _)| property.as_str())
            .collect();
        assert_eq!(keys(&sample), offered, "{name}: sample");
        let read_back = read(&sample).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(read_back, sample, "{name}: read and written again");

        let mut unknown = sample.clone();
        unknown["bogus"] = json!(1);
        let error = read(&unknown).unwrap_err().to_string();
        assert!(error.contains("unknown field `bogus`"), "{name}: {error}");

        let required = strings(&definition["required"]);
        for property in &offered {
            let mut without = sample.clone();
            without.as_object_mut().unwrap().remove(*property);
            match read(&without) {
                Ok(_) => assert!(!required.contains(property), "{name}.{property}"),
                Err(error) => {
                    assert!(required.contains(property), "{name}.{property}: {error}");
                    let expected = format!("missing field `{property}`");
                    assert!(error.to_string().contains(&expected), "{name}: {error}");
                }
            }
            check_variants(&document, &sample, name, property, read);
        }
    }
    assert_eq!(
        bodies,
        BTreeSet::new(),
        "bodies that no type was checked for"
    );
}

fn check_variants(
    document: &Value,
    sample: &Value,
    name: &str,
    property: &str,
    read: fn(&Value) -> Result<Value, serde_json::Error>,
) {
    let schema = &document["definitions"][name]["properties"][property];
    let schema = match definition_of(schema) {
        Some(definition) => &document["definitions"][definition],
        None => schema,
    };
    let variants = strings(&schema["enum"]);
    for variant in &variants {
        let mut value = sample.clone();
        value[property] = json!(variant);
        // The one template that exists on another architecture only.
        assert_eq!(
            read(&value).is_ok(),
            *variant != "V1N1",
            "{name}.{property}: {variant}"
        );
    }
    if !variants.is_empty() {
        let mut value = sample.clone();
        value[property] = json!("Bogus");
        assert!(read(&value).is_err(), "{name}.{property}");
    }
}

#[test]
fn replies_have_the_described_fields() {
    let document = load(&here("openapi.yaml"));
    let info = InstanceInfo {
        id: "a".into(),
        state: InstanceState::NotStarted,
        vmm_version: "1".into(),
        app_name: "b".into(),
        template: true,
    };
    let copy = ClonedChild {
        id: "a".into(),
        pid: 1,
        ready_us: 1,
    };
    let fault: Value = serde_json::from_str(&Fault::bad_request("x").to_json()).unwrap();
    let replies = BTreeMap::from([
        ("InstanceInfo", json!(info)),
        (
            "FirecrackerVersion",
            json!(Version {
                firecracker_version: "1".into()
            }),
        ),
        ("ClonedChild", json!(copy)),
        (
            "Cloned",
            json!(Cloned {
                pause_us: 1,
                copied_bytes: 4096,
                children: vec![copy]
            }),
        ),
        ("FullVmConfiguration", json!(FullVmConfig::default())),
        ("Error", fault),
    ]);
    for (name, reply) in replies {
        let described = keys(&document["definitions"][name]["properties"]);
        assert_eq!(keys(&reply), described, "{name}");
    }
    let states = &document["definitions"]["InstanceInfo"]["properties"]["state"];
    let written = [
        InstanceState::NotStarted,
        InstanceState::Running,
        InstanceState::Paused,
    ]
    .map(|state| json!(state));
    let written = Value::from(written.to_vec());
    assert_eq!(strings(&states["enum"]), strings(&written));
}

#[test]
fn each_sample_reaches_its_action() {
    for Checked {
        name, mut sample, ..
    } in request_types()
    {
        // Either of both, not both.
        if sample.get("mem_backend").is_some() {
            sample.as_object_mut().unwrap().remove("mem_file_path");
        }
        for row in ROUTES.iter().filter(|row| row.schema == Some(name)) {
            let path = row
                .pattern
                .replace("{drive_id}", "a")
                .replace("{iface_id}", "a");
            let action = route(row.method.as_str(), &path, sample.to_string().as_bytes());
            assert_eq!(
                written(&action.unwrap()),
                sample,
                "{} {path}",
                row.method.as_str()
            );
        }
    }
}

/// The body that makes this action.
fn written(action: &Action) -> Value {
    match action {
        Action::GetInstanceInfo
        | Action::GetVersion
        | Action::GetMachineConfig
        | Action::GetVmConfig
        | Action::GetDivergence
        | Action::GetMetrics => Value::Null,
        Action::InstanceStart => json!({"action_type": "InstanceStart"}),
        Action::SendCtrlAltDel => json!({"action_type": "SendCtrlAltDel"}),
        Action::FlushMetrics => json!({"action_type": "FlushMetrics"}),
        Action::PutBootSource(body) => json!(body),
        Action::PutCpuConfig(body) => json!(body),
        Action::PutDrive(body) => json!(body),
        Action::PatchDrive(body) => json!(body),
        Action::ResetDrive(_) => Value::Null,
        Action::PutLogger(body) => json!(body),
        Action::PutMachineConfig(body) => json!(body),
        Action::PatchMachineConfig(body) => json!(body),
        Action::PutMetrics(body) => json!(body),
        Action::PutNetworkInterface(body) => json!(body),
        Action::PatchNetworkInterface(body) => json!(body),
        Action::PutSerial(body) => json!(body),
        Action::PatchVm(body) => json!(body),
        Action::PutVsock(body) => json!(body),
        Action::CreateSnapshot(body) => json!(body),
        Action::LoadSnapshot(body) => json!(body),
        Action::Clone(body) => json!(body),
    }
}
