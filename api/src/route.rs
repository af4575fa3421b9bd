//! The one table from method and URL to [`Action`].

use serde::de::DeserializeOwned;

use crate::action::{Action, Fault};
use crate::json;
use crate::types::{
    ActionType, BootSource, CloneMachine, CpuConfig, Drive, DrivePatch, InstanceAction, Logger,
    MachineConfig, MachineConfigPatch, MetricsTarget, NetworkInterface, NetworkInterfacePatch,
    Serial, SnapshotCreate, SnapshotLoad, VmStateChange, Vsock,
};

/// The methods served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Asks, changes nothing, has no body.
    Get,
    /// Sets all of a thing.
    Put,
    /// Changes a part of a thing.
    Patch,
}

impl Method {
    /// The method as it stands in a request.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        }
    }
}

/// One row of the table.
pub struct Route {
    /// Method of the request.
    pub method: Method,
    /// Path of the request; a part in braces stands for any id.
    pub pattern: &'static str,
    /// Name of the body's schema in `openapi.yaml`, where there is a body.
    pub schema: Option<&'static str>,
    parse: Parse,
}

enum Parse {
    /// No body.
    Bare(fn() -> Action),
    /// A body.
    Body(fn(&[u8]) -> Result<Action, Fault>),
    /// No body: the id of the path says it all.
    Id(fn(&str) -> Action),
    /// A body that repeats the id of the path.
    BodyWithId(fn(&str, &[u8]) -> Result<Action, Fault>),
}

const fn get(pattern: &'static str, action: fn() -> Action) -> Route {
    Route {
        method: Method::Get,
        pattern,
        schema: None,
        parse: Parse::Bare(action),
    }
}

const fn put(pattern: &'static str, schema: &'static str, parse: Parse) -> Route {
    Route {
        method: Method::Put,
        pattern,
        schema: Some(schema),
        parse,
    }
}

const fn patch(pattern: &'static str, schema: &'static str, parse: Parse) -> Route {
    Route {
        method: Method::Patch,
        pattern,
        schema: Some(schema),
        parse,
    }
}

const fn put_id(pattern: &'static str, action: fn(&str) -> Action) -> Route {
    Route {
        method: Method::Put,
        pattern,
        schema: None,
        parse: Parse::Id(action),
    }
}

use Parse::{Body, BodyWithId};

/// Every request that is served.
pub static ROUTES: [Route; 24] = [
    get("/", || Action::GetInstanceInfo),
    get("/version", || Action::GetVersion),
    get("/machine-config", || Action::GetMachineConfig),
    get("/metrics", || Action::GetMetrics),
    get("/vm/config", || Action::GetVmConfig),
    get("/vm/divergence", || Action::GetDivergence),
    put("/actions", "InstanceActionInfo", Body(instance_action)),
    put(
        "/boot-source",
        "BootSource",
        Body(|body| read::<BootSource>(body).map(Action::PutBootSource)),
    ),
    put(
        "/clone",
        "CloneParams",
        Body(|body| read::<CloneMachine>(body).map(Action::Clone)),
    ),
    put(
        "/cpu-config",
        "CpuConfig",
        Body(|body| read::<CpuConfig>(body).map(Action::PutCpuConfig)),
    ),
    put("/drives/{drive_id}", "Drive", BodyWithId(put_drive)),
    patch(
        "/drives/{drive_id}",
        "PartialDrive",
        BodyWithId(patch_drive),
    ),
    put_id("/drives/{drive_id}/reset", |id| {
        Action::ResetDrive(id.to_owned())
    }),
    put(
        "/logger",
        "Logger",
        Body(|body| read::<Logger>(body).map(Action::PutLogger)),
    ),
    put(
        "/machine-config",
        "MachineConfiguration",
        Body(|body| read::<MachineConfig>(body).map(Action::PutMachineConfig)),
    ),
    patch(
        "/machine-config",
        "MachineConfiguration",
        Body(patch_machine_config),
    ),
    put(
        "/metrics",
        "Metrics",
        Body(|body| read::<MetricsTarget>(body).map(Action::PutMetrics)),
    ),
    put(
        "/network-interfaces/{iface_id}",
        "NetworkInterface",
        BodyWithId(put_network_interface),
    ),
    patch(
        "/network-interfaces/{iface_id}",
        "PartialNetworkInterface",
        BodyWithId(patch_network_interface),
    ),
    put(
        "/serial",
        "SerialDevice",
        Body(|body| read::<Serial>(body).map(Action::PutSerial)),
    ),
    put(
        "/snapshot/create",
        "SnapshotCreateParams",
        Body(|body| read::<SnapshotCreate>(body).map(Action::CreateSnapshot)),
    ),
    put("/snapshot/load", "SnapshotLoadParams", Body(load_snapshot)),
    patch(
        "/vm",
        "Vm",
        Body(|body| read::<VmStateChange>(body).map(Action::PatchVm)),
    ),
    put(
        "/vsock",
        "Vsock",
        Body(|body| read::<Vsock>(body).map(Action::PutVsock)),
    ),
];

/// First part of a path of the specification that is not served, and why. The sentence follows "This VMM offers no ".
pub static NOT_OFFERED: [(&str, &str); 5] = [
    (
        "balloon",
        "balloon: block, network and vsock are its only devices, by design, and guest memory is given back by the host's own means",
    ),
    (
        "entropy",
        "entropy device: block, network and vsock are its only devices, by design, and the guest takes entropy from the CPU",
    ),
    (
        "hotplug",
        "hotplug: memory and devices are fixed when the machine starts, by design",
    ),
    (
        "mmds",
        "metadata service: block, network and vsock are its only devices, by design; send metadata over vsock",
    ),
    (
        "pmem",
        "pmem: block, network and vsock are its only devices, by design; use a read-only drive",
    ),
];

/// Finds the action that a request asks for. `target` is the request target as sent; an empty body is no body.
///
/// Every fault has status 400.
pub fn route(method: &str, target: &str, body: &[u8]) -> Result<Action, Fault> {
    let unknown = || {
        Fault::bad_request(format!(
            "Invalid request method and/or path: {method} {target}."
        ))
    };
    let path = absolute_path(target).ok_or_else(unknown)?;
    let (route, id) = ROUTES
        .iter()
        .filter(|route| route.method.as_str() == method)
        .find_map(|route| Some((route, capture(route.pattern, path)?)))
        .ok_or_else(|| not_offered(path).unwrap_or_else(unknown))?;
    match (&route.parse, body.is_empty()) {
        (Parse::Bare(action), true) => Ok(action()),
        (Parse::Id(action), true) => Ok(action(checked_id(id)?)),
        (Parse::Bare(_) | Parse::Id(_), false) => Err(Fault::bad_request(format!(
            "{method} request cannot have a body."
        ))),
        (Parse::Body(_) | Parse::BodyWithId(_), true) => {
            Err(Fault::bad_request(format!("Empty {method} request.")))
        }
        (Parse::Body(parse), false) => parse(body),
        (Parse::BodyWithId(parse), false) => parse(checked_id(id)?, body),
    }
}

/// The path of a request target, also of one in absolute form (RFC 9112, section 3.2.2), without the slash that may
/// end it.
fn absolute_path(target: &str) -> Option<&str> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => &rest[rest.find('/')?..],
        None => target,
    };
    match path.strip_suffix('/') {
        Some("") => Some(path),
        Some(shorter) => Some(shorter),
        None => Some(path),
    }
    .filter(|path| path.starts_with('/'))
}

/// Whether the path fits the pattern, and the id in it. A collection's path without an id fits with an empty id, so
/// that the fault can say that the id is missing.
fn capture<'p>(pattern: &str, path: &'p str) -> Option<&'p str> {
    match pattern.split_once("/{") {
        None => (path == pattern).then_some(""),
        Some((collection, last)) => {
            let (_, suffix) = last.split_once('}')?;
            match path.strip_prefix(collection)?.strip_suffix(suffix)? {
                "" => Some(""),
                rest => rest.strip_prefix('/').filter(|id| !id.contains('/')),
            }
        }
    }
}

/// Why a part of the specification is not served, as the end of "This VMM offers no ".
pub(crate) fn why_not_offered(part: &str) -> Option<&'static str> {
    let (_, why) = NOT_OFFERED.iter().find(|(name, _)| *name == part)?;
    Some(why)
}

fn not_offered(path: &str) -> Option<Fault> {
    let why = why_not_offered(path.split('/').nth(1)?)?;
    Some(Fault::bad_request(format!(
        "{path}: This VMM offers no {why}."
    )))
}

fn checked_id(id: &str) -> Result<&str, Fault> {
    if id.is_empty() {
        return Err(Fault::bad_request("The ID cannot be empty."));
    }
    let allowed = |character: char| character.is_ascii_alphanumeric() || "_-".contains(character);
    if !id.chars().all(allowed) {
        return Err(Fault::bad_request(format!(
            "API Resource IDs can only contain alphanumeric characters, underscores and dashes: {id:?}."
        )));
    }
    Ok(id)
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    json::parse(body).map_err(|error| {
        Fault::bad_request(format!(
            "An error occurred when deserializing the json body of a request: {error}."
        ))
    })
}

fn same_id(path: &str, body: &str) -> Result<(), Fault> {
    if path == body {
        return Ok(());
    }
    Err(Fault::bad_request(format!(
        "The id from the path [{path}] does not match the id from the body [{body}]!"
    )))
}

fn instance_action(body: &[u8]) -> Result<Action, Fault> {
    Ok(match read::<InstanceAction>(body)?.action_type {
        ActionType::FlushMetrics => Action::FlushMetrics,
        ActionType::InstanceStart => Action::InstanceStart,
        ActionType::SendCtrlAltDel => Action::SendCtrlAltDel,
    })
}

fn put_drive(id: &str, body: &[u8]) -> Result<Action, Fault> {
    let drive: Drive = read(body)?;
    same_id(id, &drive.drive_id)?;
    Ok(Action::PutDrive(drive))
}

fn patch_drive(id: &str, body: &[u8]) -> Result<Action, Fault> {
    let patch: DrivePatch = read(body)?;
    same_id(id, &patch.drive_id)?;
    Ok(Action::PatchDrive(patch))
}

fn put_network_interface(id: &str, body: &[u8]) -> Result<Action, Fault> {
    let interface: NetworkInterface = read(body)?;
    same_id(id, &interface.iface_id)?;
    Ok(Action::PutNetworkInterface(interface))
}

fn patch_network_interface(id: &str, body: &[u8]) -> Result<Action, Fault> {
    let patch: NetworkInterfacePatch = read(body)?;
    same_id(id, &patch.iface_id)?;
    Ok(Action::PatchNetworkInterface(patch))
}

/// Memory comes from one place, whichever field names it.
fn load_snapshot(body: &[u8]) -> Result<Action, Fault> {
    let load: SnapshotLoad = read(body)?;
    let wrong = match (&load.mem_backend, &load.mem_file_path) {
        (Some(_), Some(_)) => {
            "too many fields: either `mem_backend` or `mem_file_path` exclusively is required"
        }
        (None, None) => "missing field: either `mem_backend` or `mem_file_path` is required",
        _ => return Ok(Action::LoadSnapshot(load)),
    };
    Err(Fault::bad_request(format!(
        "An error occurred when deserializing the json body of a request: {wrong}."
    )))
}

fn patch_machine_config(body: &[u8]) -> Result<Action, Fault> {
    let patch: MachineConfigPatch = read(body)?;
    if patch == MachineConfigPatch::default() {
        return Err(Fault::bad_request("Empty PATCH request."));
    }
    Ok(Action::PatchMachineConfig(patch))
}

#[cfg(test)]
mod tests;
