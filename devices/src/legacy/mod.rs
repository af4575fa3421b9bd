//! The few devices of a PC that a kernel expects before it finds virtio.

pub mod i8042;
pub mod ioapic;
pub mod serial;

use std::convert::Infallible;
use std::sync::Arc;

use vm_superio::Trigger;

use crate::virtio::interrupt::IrqLine;

/// An interrupt line as the devices of vm-superio want it.
pub struct LineTrigger(Arc<dyn IrqLine>);

impl Trigger for LineTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}
