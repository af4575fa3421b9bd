//! Metrics, and what of a machine is its own.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use lepton_api::types::{Divergence, DriveDivergence, Shares};
use lepton_api::{Action, Fault, Reply};
use vmm_sys_util::timerfd::TimerFd;

use super::dispatch::{Controller, StartError, refused};
use super::mailbox::{Mailbox, Message};
use crate::events::Loop;
use crate::memory::private::Count;
use crate::metrics::{Groups, OPEN_METRICS, OpenMetrics};
use crate::reach;

const METRICS_PERIOD: Duration = Duration::from_secs(60);

/// What a client asked for, but for the pages of memory, which are not counted yet.
pub(super) struct Report {
    form: Form,
    memory: io::Result<Option<Count>>,
    drives: Vec<DriveDivergence>,
}

enum Form {
    Divergence,
    OpenMetrics(OpenMetrics),
}

impl Report {
    /// Whether it takes a time that grows with memory.
    fn is_long(&self) -> bool {
        matches!(self.memory, Ok(Some(Count::Pages { .. })))
    }

    /// Counts pages, and answers.
    pub(super) fn finish(self) -> Result<Reply, Fault> {
        let Report {
            form,
            memory,
            drives,
        } = self;
        let memory = memory.and_then(|count| match count {
            Some(count) => count.finish(),
            None => Ok(None),
        });
        let divergence = |memory: Option<crate::memory::private::Shares>| Divergence {
            memory: memory.map(|shares| Shares {
                private_bytes: shares.private,
                shared_bytes: shares.shared,
            }),
            drives,
        };
        match form {
            Form::Divergence => Reply::json(&divergence(memory.map_err(refused)?)),
            // What cannot be counted is left out, as it is in a jail.
            Form::OpenMetrics(sums) => Ok(Reply::Text {
                content_type: OPEN_METRICS,
                body: sums.with(&divergence(memory.ok().flatten())).finish(),
            }),
        }
    }
}

impl Controller {
    /// GET /metrics and GET /vm/divergence. Where pages are to be counted, a thread of its own does that and answers:
    /// devices have work to do meanwhile.
    pub(super) fn tell(&mut self, asked: &Action, answer: SyncSender<Result<Reply, Fault>>) {
        let report = match self.admit(asked) {
            Ok(()) => self.report_of(asked),
            Err(fault) => {
                log::warn!("request refused: {}", fault.message);
                drop(answer.send(Err(fault)));
                return;
            }
        };
        if !report.is_long() {
            // A client that is gone needs no answer.
            drop(answer.send(report.finish()));
            return;
        }
        let unthreaded = answer.clone();
        let spawned = std::thread::Builder::new()
            .name("pages".into())
            .stack_size(128 << 10)
            .spawn(move || {
                let told = match reach::give_up_files() {
                    Ok(()) => report.finish(),
                    Err(error) => Err(refused(error)),
                };
                drop(answer.send(told));
            });
        if let Err(error) = spawned {
            drop(unthreaded.send(Err(refused(error))));
        }
    }

    /// What is asked for, as it is now.
    pub(super) fn report_of(&self, asked: &Action) -> Report {
        Report {
            form: match asked {
                Action::GetMetrics => {
                    let sums = self
                        .metrics
                        .open_metrics(&self.options.id, self.metric_groups());
                    Form::OpenMetrics(sums)
                }
                _ => Form::Divergence,
            },
            memory: self.phase.ram().map(|ram| ram.count()).transpose(),
            drives: self.configuration.devices.divergence(),
        }
    }

    fn metric_groups(&self) -> Groups {
        let mut groups = self.configuration.devices.metrics();
        if let Some(machine) = self.phase.machine() {
            groups.push(("vcpu".into(), machine.vcpu_metrics().clone()));
            let bus = machine.bus();
            let lock = std::sync::PoisonError::into_inner;
            let serial = bus.serial.lock().unwrap_or_else(lock).metrics();
            groups.push(("uart".into(), serial));
            let lock = std::sync::PoisonError::into_inner;
            let i8042 = bus.i8042.lock().unwrap_or_else(lock).metrics();
            groups.push(("i8042".into(), i8042));
        }
        groups
    }

    pub(super) fn flush_metrics(&mut self) {
        let groups = self.metric_groups();
        if let Err(error) = self.metrics.flush(&self.options.id, groups) {
            log::error!("metrics cannot be written: {error}");
        }
    }

    pub(super) fn flush_on_request(&mut self) -> Result<(), Fault> {
        if !self.metrics.has_target() {
            return Err(refused("FlushMetrics: no metrics_path: PUT /metrics first"));
        }
        let groups = self.metric_groups();
        self.metrics
            .flush(&self.options.id, groups)
            .map_err(|e| refused(format!("FlushMetrics: {e}")))
    }

    pub(super) fn start_metrics_timer(&self, events: &mut Loop) -> Result<(), StartError> {
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        timer
            .reset(METRICS_PERIOD, Some(METRICS_PERIOD))
            .map_err(io::Error::from)?;
        events.add_subscriber(Box::new(MetricsTimer {
            timer,
            mailbox: self.mailbox.clone(),
        }));
        Ok(())
    }
}

struct MetricsTimer {
    timer: TimerFd,
    mailbox: Mailbox,
}

impl MutEventSubscriber for MetricsTimer {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.mailbox.send(Message::MetricsDue);
    }

    fn init(&mut self, ops: &mut EventOps) {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::with_data_raw(self.timer.as_raw_fd(), 0, edge)) {
            log::error!("cannot watch the metrics timer: {error}");
        }
    }
}
