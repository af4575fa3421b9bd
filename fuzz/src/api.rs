//! What clients of the API send.

use lepton_api::action::Action;
use lepton_api::config_file;
use lepton_api::http::parse_request;
use lepton_api::route::{ROUTES, route};
use lepton_vmm::config::Shape;
use lepton_vmm::config::cpu::CpuTemplate;
use lepton_vmm::controller::policy::{Stage, allow};
use lepton_vmm::loader::check_arguments;

/// Less than the server's own limit, so that it is reached.
const MAX_PAYLOAD: usize = 1024;

/// Requests, one behind the other, as a connection takes them.
pub fn http(data: &[u8]) {
    let mut rest = data;
    loop {
        match parse_request(rest, MAX_PAYLOAD) {
            Ok(Some((request, length))) => {
                assert!(0 < length && length <= rest.len());
                assert!(request.body.len() <= MAX_PAYLOAD);
                // Until all of it is there, there is nothing, and above all no other request.
                for cut in [1, length / 2, length - 1] {
                    let part = rest.get(..cut).unwrap_or_default();
                    assert_eq!(parse_request(part, MAX_PAYLOAD), Ok(None));
                }
                use_action(route(request.method, request.target, request.body).ok());
                rest = rest.get(length..).unwrap_or_default();
            }
            Ok(None) => return,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return;
            }
        }
    }
}

/// The first byte chooses the request, the rest is its body.
pub fn body(data: &[u8]) {
    let Some((&choice, body)) = data.split_first() else {
        return;
    };
    let Some(chosen) = ROUTES.get(usize::from(choice) % ROUTES.len()) else {
        return;
    };
    let path = match chosen.pattern.split_once('{') {
        None => chosen.pattern.to_owned(),
        Some((before, rest)) => {
            let behind = rest.split_once('}').map_or("", |(_, behind)| behind);
            format!("{before}a{behind}")
        }
    };
    match route(chosen.method.as_str(), &path, body) {
        Ok(action) => use_action(Some(action)),
        Err(fault) => assert!(!fault.to_string().is_empty()),
    }
}

/// A configuration, which may name itself as its CPU template.
pub fn config_file(data: &[u8]) {
    match config_file::parse(data, |_| Ok(data.to_vec())) {
        Ok(actions) => actions
            .into_iter()
            .for_each(|action| use_action(Some(action))),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// What is done with an action before it touches the host.
fn use_action(action: Option<Action>) {
    let Some(action) = action else {
        return;
    };
    let stages = [
        Stage::Fresh,
        Stage::Configuring,
        Stage::Running,
        Stage::Paused,
    ];
    let allowed = stages.map(|stage| allow(stage, &action).is_ok());
    assert!(allowed.contains(&true), "{action:?} is never allowed");
    match action {
        Action::PutMachineConfig(config) => {
            if let Ok(shape) = Shape::try_from(&config) {
                assert_eq!(shape.memory.bytes() >> 20, config.mem_size_mib);
            }
        }
        Action::PutCpuConfig(config) => drop(CpuTemplate::try_from(config).map(drop)),
        Action::PutBootSource(boot) => {
            drop(check_arguments(boot.boot_args.as_deref().unwrap_or("")));
        }
        _ => {}
    }
}
