//! How to get a vCPU out of the guest without losing the request.
#![allow(unsafe_code)] // a byte shared with KVM, and a signal to a thread

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

/// The signal that takes a thread out of KVM_RUN. Its handler does nothing.
pub fn signal_number() -> libc::c_int {
    vmm_sys_util::signal::SIGRTMIN()
}

/// `kvm_run.immediate_exit` of one vCPU (KVM API, 5): while it is set, KVM_RUN returns at once with EINTR. Set before
/// the signal is sent, it closes the gap between the vCPU's last look at its orders and its entry into the guest.
#[derive(Clone)]
pub struct Kick {
    flag: Arc<Flag>,
}

struct Flag(*const AtomicU8);

// SAFETY: the pointer is to one byte that is only accessed atomically here and read by the kernel.
unsafe impl Send for Flag {}
// SAFETY: as above.
unsafe impl Sync for Flag {}

impl Kick {
    /// The flag of `fd`. The result must not be used once `fd` is dropped; [`super::VcpuThread`] and its thread see to
    /// that: each holds `fd` as long as its `Kick`.
    pub fn new(fd: &mut VcpuFd) -> Self {
        let run: *mut kvm_bindings::kvm_run = fd.get_kvm_run();
        // SAFETY: `run` points to the mapped kvm_run of `fd`, so a field of it is in bounds.
        let byte = unsafe { &raw mut (*run).immediate_exit };
        Kick {
            flag: Arc::new(Flag(byte.cast_const().cast())),
        }
    }

    /// Makes the vCPU whose thread is `thread` leave the guest, or not enter it.
    pub fn interrupt(&self, thread: &JoinHandle<()>) {
        self.hold();
        // SAFETY: the handle is not joined yet, so the thread id is valid; the signal has a handler.
        unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, signal_number()) };
    }

    /// Lets KVM_RUN end what the last exit began, and no more.
    pub fn hold(&self) {
        self.set(1);
    }

    /// Lets the vCPU enter the guest again.
    pub fn clear(&self) {
        self.set(0);
    }

    fn set(&self, value: u8) {
        // A swap, so that who clears the flag sees whatever was ordered before it was set.
        // SAFETY: the mapping is alive (see `new`), and the byte is accessed by nobody else but the kernel.
        unsafe { (*self.flag.0).swap(value, Ordering::SeqCst) };
    }
}
