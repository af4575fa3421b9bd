use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, OnceLock, TryLockError, Weak};

use lepton_devices::virtio::device::{DeviceKind, Resources};
use lepton_devices::virtio::interrupt::IrqLine;
use lepton_devices::virtio::state::{DeviceState, QueuePosition, RestoreError};

use super::*;

/// A device for which everything that is asked of it is too much.
struct Breaks;

impl VirtioDevice for Breaks {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn queue_sizes(&self) -> &[u16] {
        &[]
    }
    fn features(&self) -> u64 {
        0
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn write_config(&mut self, _: u64, _: &[u8]) {}
    fn activate(&mut self, _: Resources) -> Result<(), DeviceError> {
        Ok(())
    }
    fn reset(&mut self) {}
    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }
    fn process_queue(&mut self, _: usize) -> Result<Progress, DeviceError> {
        Err(DeviceError::Fatal("a broken queue".into()))
    }
    fn process_source(&mut self, _: usize) -> Result<Progress, DeviceError> {
        Ok(Progress::Done)
    }
    fn quiesce(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn save(&self) -> DeviceState {
        unreachable!("it is not saved")
    }
    fn positions(&self) -> Option<Vec<QueuePosition>> {
        None
    }
    fn load(&mut self, _: &DeviceState) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// Counts how often it is raised while somebody has the device, and while nobody has.
#[derive(Default)]
struct Witness {
    device: OnceLock<Weak<Mutex<dyn VirtioDevice>>>,
    held: AtomicUsize,
    free: AtomicUsize,
}

impl IrqLine for Witness {
    fn raise(&self) {
        let device = self.device.get().and_then(Weak::upgrade);
        let device = device.expect("there is a device");
        let is_held = matches!(device.try_lock(), Err(TryLockError::WouldBlock));
        let count = if is_held { &self.held } else { &self.free };
        count.fetch_add(1, Ordering::SeqCst);
    }
}

/// A driver that resets the device takes it first. So it finds it broken and mends that, or it was before.
#[test]
fn a_device_is_marked_broken_before_a_reset_can_come() {
    let device: SharedDevice = Arc::new(Mutex::new(Breaks));
    let witness = Arc::new(Witness::default());
    assert!(witness.device.set(Arc::downgrade(&device)).is_ok());
    let interrupt = Arc::new(Interrupt::new(witness.clone()));
    let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut events = DeviceEvents::new(
        "d".into(),
        device,
        interrupt.clone(),
        vec![kick],
        Arc::default(),
    )
    .unwrap();
    events.run(Work::Queue(0));
    assert!(interrupt.is_broken());
    let count = |count: &AtomicUsize| count.load(Ordering::SeqCst);
    assert_eq!((count(&witness.held), count(&witness.free)), (1, 0));
}
