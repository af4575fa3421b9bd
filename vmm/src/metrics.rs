//! Metrics: Firecracker's form, one line of JSON each time they are flushed, and OpenMetrics on request.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use lepton_api::Action;
use lepton_api::types::MetricsTarget;
use lepton_devices::counters;
use lepton_devices::metrics::{Counter, MetricGroup};
use serde_json::{Map, Value, json};

use crate::log::{SinkError, open_sink};

mod open_metrics;

pub use self::open_metrics::{OPEN_METRICS, OpenMetrics};

counters! {
    /// GET requests.
    pub struct GetRequests {
        /// GET /.
        instance_info_count,
        /// GET /machine-config.
        machine_cfg_count,
        /// GET /version.
        vmm_version_count,
    }
}

counters! {
    /// PUT requests, and those of them that failed.
    pub struct PutRequests {
        /// PUT /actions.
        actions_count,
        /// Failed ones.
        actions_fails,
        /// PUT /boot-source.
        boot_source_count,
        /// Failed ones.
        boot_source_fails,
        /// PUT /cpu-config.
        cpu_cfg_count,
        /// Failed ones.
        cpu_cfg_fails,
        /// PUT /drives.
        drive_count,
        /// Failed ones.
        drive_fails,
        /// PUT /logger.
        logger_count,
        /// Failed ones.
        logger_fails,
        /// PUT /machine-config.
        machine_cfg_count,
        /// Failed ones.
        machine_cfg_fails,
        /// PUT /metrics.
        metrics_count,
        /// Failed ones.
        metrics_fails,
        /// PUT /network-interfaces.
        network_count,
        /// Failed ones.
        network_fails,
        /// PUT /serial.
        serial_count,
        /// Failed ones.
        serial_fails,
        /// PUT /vsock.
        vsock_count,
        /// Failed ones.
        vsock_fails,
    }
}

counters! {
    /// PATCH requests, and those of them that failed.
    pub struct PatchRequests {
        /// PATCH /drives.
        drive_count,
        /// Failed ones.
        drive_fails,
        /// PATCH /machine-config.
        machine_cfg_count,
        /// Failed ones.
        machine_cfg_fails,
        /// PATCH /network-interfaces.
        network_count,
        /// Failed ones.
        network_fails,
    }
}

counters! {
    /// Requests that use something deprecated.
    pub struct DeprecatedApi {
        /// Such requests.
        deprecated_http_api_calls,
    }
}

/// The groups that the controller itself counts.
#[derive(Default)]
pub struct ApiMetrics {
    get: Arc<GetRequests>,
    put: Arc<PutRequests>,
    patch: Arc<PatchRequests>,
    deprecated: Arc<DeprecatedApi>,
}

impl ApiMetrics {
    /// Counts a request and whether it failed.
    pub fn count(&self, counted: Counted, failed: bool) {
        let (count, fails): (Option<&Counter>, Option<&Counter>) = match counted {
            Counted::InstanceInfo => (Some(&self.get.instance_info_count), None),
            Counted::Version => (Some(&self.get.vmm_version_count), None),
            Counted::GetMachine => (Some(&self.get.machine_cfg_count), None),
            Counted::Actions => (Some(&self.put.actions_count), Some(&self.put.actions_fails)),
            Counted::Boot => (
                Some(&self.put.boot_source_count),
                Some(&self.put.boot_source_fails),
            ),
            Counted::Cpu => (Some(&self.put.cpu_cfg_count), Some(&self.put.cpu_cfg_fails)),
            Counted::Drive => (Some(&self.put.drive_count), Some(&self.put.drive_fails)),
            Counted::Logger => (Some(&self.put.logger_count), Some(&self.put.logger_fails)),
            Counted::Machine => (
                Some(&self.put.machine_cfg_count),
                Some(&self.put.machine_cfg_fails),
            ),
            Counted::Metrics => (Some(&self.put.metrics_count), Some(&self.put.metrics_fails)),
            Counted::Network => (Some(&self.put.network_count), Some(&self.put.network_fails)),
            Counted::Serial => (Some(&self.put.serial_count), Some(&self.put.serial_fails)),
            Counted::Vsock => (Some(&self.put.vsock_count), Some(&self.put.vsock_fails)),
            Counted::PatchDrive => (Some(&self.patch.drive_count), Some(&self.patch.drive_fails)),
            Counted::PatchMachine => (
                Some(&self.patch.machine_cfg_count),
                Some(&self.patch.machine_cfg_fails),
            ),
            Counted::PatchNetwork => (
                Some(&self.patch.network_count),
                Some(&self.patch.network_fails),
            ),
            Counted::Nothing => (None, None),
        };
        if let Some(count) = count {
            count.inc();
        }
        if let (Some(fails), true) = (fails, failed) {
            fails.inc();
        }
    }

    /// Counts a request that uses something deprecated.
    pub fn count_deprecated(&self) {
        self.deprecated.deprecated_http_api_calls.inc();
    }

    fn groups(&self) -> Vec<(String, Arc<dyn MetricGroup>)> {
        vec![
            ("get_api_requests".into(), self.get.clone()),
            ("put_api_requests".into(), self.put.clone()),
            ("patch_api_requests".into(), self.patch.clone()),
            ("deprecated_api".into(), self.deprecated.clone()),
        ]
    }
}

/// Under what an action is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Counted {
    InstanceInfo,
    Version,
    GetMachine,
    Actions,
    Boot,
    Cpu,
    Drive,
    Logger,
    Machine,
    Metrics,
    Network,
    Serial,
    Vsock,
    PatchDrive,
    PatchMachine,
    PatchNetwork,
    Nothing,
}

impl From<&Action> for Counted {
    fn from(action: &Action) -> Self {
        match action {
            Action::GetInstanceInfo => Counted::InstanceInfo,
            Action::GetVersion => Counted::Version,
            Action::GetMachineConfig => Counted::GetMachine,
            Action::GetVmConfig
            | Action::GetDivergence
            | Action::GetMetrics
            | Action::ResetDrive(_)
            | Action::PatchVm(_)
            | Action::CreateSnapshot(_)
            | Action::LoadSnapshot(_)
            | Action::Clone(_) => Counted::Nothing,
            Action::InstanceStart | Action::SendCtrlAltDel | Action::FlushMetrics => {
                Counted::Actions
            }
            Action::PutBootSource(_) => Counted::Boot,
            Action::PutCpuConfig(_) => Counted::Cpu,
            Action::PutDrive(_) => Counted::Drive,
            Action::PatchDrive(_) => Counted::PatchDrive,
            Action::PutLogger(_) => Counted::Logger,
            Action::PutMachineConfig(_) => Counted::Machine,
            Action::PatchMachineConfig(_) => Counted::PatchMachine,
            Action::PutMetrics(_) => Counted::Metrics,
            Action::PutNetworkInterface(_) => Counted::Network,
            Action::PatchNetworkInterface(_) => Counted::PatchNetwork,
            Action::PutSerial(_) => Counted::Serial,
            Action::PutVsock(_) => Counted::Vsock,
        }
    }
}

/// Where metrics are flushed to.
struct Target {
    file: File,
    emit_id: bool,
    properties: BTreeMap<String, String>,
}

/// Why metrics cannot be written where asked.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// There is a place for them already.
    #[error("the metrics go to a file already")]
    Twice,
    /// The file cannot be opened.
    #[error("metrics_path {0}")]
    Sink(#[from] SinkError),
}

/// Where metrics go, for the handler of a signal that ends the process; negative: nowhere.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

/// Where metrics go: a descriptor that stays open, if there is one.
pub fn descriptor() -> Option<RawFd> {
    let fd = DESCRIPTOR.load(Ordering::Relaxed);
    (fd >= 0).then_some(fd)
}

/// All metrics of the process.
#[derive(Default)]
pub struct Metrics {
    /// Requests.
    pub api: ApiMetrics,
    /// Microseconds from the process's start, as its parent gave it, to the API: wall clock and CPU.
    pub startup_us: (u64, u64),
    target: Option<Target>,
    /// Values at the last flush: Firecracker's form has the growth since then, not the sum.
    flushed: BTreeMap<(String, &'static str), u64>,
    failures: u64,
}

/// Groups beside the controller's own: vCPUs, console, devices.
pub type Groups = Vec<(String, Arc<dyn MetricGroup>)>;

impl Metrics {
    /// PUT /metrics, once.
    pub fn set_target(&mut self, target: MetricsTarget) -> Result<(), TargetError> {
        if self.target.is_some() {
            return Err(TargetError::Twice);
        }
        let file = open_sink(&target.metrics_path)?;
        DESCRIPTOR.store(file.as_raw_fd(), Ordering::Relaxed);
        self.target = Some(Target {
            file,
            emit_id: target.emit_id,
            properties: target.properties.unwrap_or_default(),
        });
        Ok(())
    }

    /// Whether there is a place to flush to.
    pub fn has_target(&self) -> bool {
        self.target.is_some()
    }

    /// Writes one line of JSON. Nothing happens without a target.
    pub fn flush(&mut self, id: &str, groups: Groups) -> std::io::Result<()> {
        if self.target.is_none() {
            return Ok(());
        }
        let mut line = self.json(groups);
        let Some(target) = &mut self.target else {
            return Ok(());
        };
        if target.emit_id {
            line.insert("id".into(), json!(id));
        }
        if !target.properties.is_empty() {
            line.insert("properties".into(), json!(target.properties));
        }
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        let written = target.file.write_all(text.as_bytes());
        if written.is_err() {
            self.failures += 1;
        }
        written
    }

    fn json(&mut self, groups: Groups) -> Map<String, Value> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_millis());
        let mut line = Map::new();
        line.insert("utc_timestamp_ms".into(), json!(now as u64));
        line.insert(
            "api_server".into(),
            json!({
                "process_startup_time_us": self.startup_us.0,
                "process_startup_time_cpu_us": self.startup_us.1,
            }),
        );
        line.insert(
            "logger".into(),
            json!({
                "missed_metrics_count": self.failures,
                "metrics_fails": 0,
                "missed_log_count": crate::log::missed(),
                "rate_limited_log_count": 0,
            }),
        );
        // Each of these ends the process, so it is counted in a last line of its own (see `signal`).
        line.insert("seccomp".into(), json!({ "num_faults": 0 }));
        line.insert(
            "signals".into(),
            json!({ "sigbus": 0, "sigill": 0, "sigsegv": 0, "sigxcpu": 0, "sigxfsz": 0 }),
        );
        for (name, group) in self.all(groups) {
            let mut values = Map::new();
            group.visit(&mut |metric, value| {
                let last = self.flushed.insert((name.clone(), metric), value);
                let growth = value.wrapping_sub(last.unwrap_or(0));
                values.insert(metric.into(), json!(growth));
            });
            // Firecracker adds up all drives under "block", all interfaces under "net".
            for (prefix, sum) in [("block_", "block"), ("net_", "net")] {
                if name.starts_with(prefix) {
                    add(&mut line, sum, &values);
                }
            }
            line.insert(name, Value::Object(values));
        }
        line
    }

    fn all(&self, groups: Groups) -> Groups {
        let mut all = self.api.groups();
        all.extend(groups);
        all
    }

    /// The sums, for OpenMetrics.
    pub fn open_metrics(&self, id: &str, groups: Groups) -> OpenMetrics {
        OpenMetrics::new(id, self.all(groups))
    }
}

fn add(line: &mut Map<String, Value>, sum: &str, values: &Map<String, Value>) {
    let total = line.entry(sum).or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(total) = total {
        for (metric, value) in values {
            let old = total.get(metric).and_then(Value::as_u64).unwrap_or(0);
            let new = old.wrapping_add(value.as_u64().unwrap_or(0));
            total.insert(metric.clone(), json!(new));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    counters! {
        /// A drive's.
        pub struct Drive {
            /// Reads.
            read_count,
        }
    }

    fn two_drives() -> (Arc<Drive>, Arc<Drive>, Groups) {
        let (a, b) = (Arc::new(Drive::default()), Arc::new(Drive::default()));
        let groups: Groups = vec![("block_a".into(), a.clone()), ("block_b".into(), b.clone())];
        (a, b, groups)
    }

    #[test]
    fn json_has_growth_and_sums_over_drives() {
        let mut metrics = Metrics::default();
        let (a, b, groups) = two_drives();
        metrics.api.count(Counted::Drive, true);
        a.read_count.add(3);
        b.read_count.add(4);
        let line = metrics.json(groups.clone());
        assert_eq!(line["block"]["read_count"], 7);
        assert_eq!(line["block_a"]["read_count"], 3);
        assert_eq!(line["put_api_requests"]["drive_fails"], 1);
        a.read_count.add(1);
        let line = metrics.json(groups);
        assert_eq!(line["block"]["read_count"], 1);
        assert_eq!(line["put_api_requests"]["drive_fails"], 0);
    }

    #[test]
    fn a_second_target_is_refused() {
        let mut metrics = Metrics::default();
        let target = MetricsTarget {
            metrics_path: "/dev/null".into(),
            emit_id: false,
            properties: None,
        };
        metrics.set_target(target.clone()).unwrap();
        assert!(matches!(
            metrics.set_target(target),
            Err(TargetError::Twice)
        ));
    }
}
