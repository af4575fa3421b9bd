//! Every ioctl on KVM and on a virtual machine.
#![allow(unsafe_code)] // handing memory to KVM

use std::cell::{Cell, RefCell};
use std::os::fd::{FromRawFd, IntoRawFd, RawFd};
use std::sync::{Arc, Barrier, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CLOCK_REALTIME, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clock_data, kvm_enable_cap, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use lepton_devices::Memory;
use lepton_devices::legacy::ioapic::{self, MsiSink};
use lepton_devices::virtio::transport::mmio::QUEUE_NOTIFY;
use lepton_hostio::inherited;
use rustix::time::ClockId;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::cpuid::{self, Topology};
use crate::arch::x86_64::layout;
use crate::clock::time_on;
use crate::memory::place::Place;
use crate::reach;
use crate::vcpu::state::{self, CpuidLeaf, Fresh, Saveable, VcpuState};

const API_VERSION: i32 = 12;

/// What went wrong with KVM, and in which call.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm cannot be opened.
    #[error("/dev/kvm: {0}; load kvm-amd or kvm-intel, and let this user read and write it")]
    Open(kvm_ioctls::Error),
    /// The descriptor that this process was started with is not one of /dev/kvm.
    #[error("--kvm-fd {0}: not an open descriptor of /dev/kvm")]
    Handed(RawFd),
    /// KVM speaks another API.
    #[error("/dev/kvm has API version {0}, not {API_VERSION}")]
    Version(i32),
    /// KVM lacks something that no machine can do without.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// A call failed.
    #[error("{call}: {source}")]
    Call {
        /// The ioctl's name.
        call: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
}

fn call<T>(call: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, KvmError> {
    result.map_err(|source| KvmError::Call { call, source })
}

/// The host's KVM, for one machine.
pub struct Hypervisor {
    kvm: Arc<Kvm>,
    /// A machine that was made ahead.
    ahead: RefCell<Option<Ahead>>,
}

/// How far a machine is that was made ahead.
enum Ahead {
    /// Nothing was given to it yet.
    Blank(VmFd),
    /// It has the memory that will be at this place, and its first vCPU.
    Fitted(Place, Vm),
}

impl Ahead {
    fn suits(&self, memory: &Memory, track_dirty: bool) -> bool {
        match self {
            Ahead::Blank(_) => true,
            Ahead::Fitted(place, _) => {
                std::ptr::eq(&raw const **place.memory(), memory) && !track_dirty
            }
        }
    }
}

/// What [`Hypervisor::supported_cpuid`] was told. It stays the same as long as the host runs.
static SUPPORTED: OnceLock<CpuId> = OnceLock::new();

/// The thread that asks.
static ASKING: Mutex<Option<JoinHandle<()>>> = Mutex::new(None);

/// What [`use_descriptor`] was given.
static HANDED: OnceLock<Arc<Kvm>> = OnceLock::new();

/// Lets every [`Hypervisor::open`] use an inherited descriptor of /dev/kvm: in a jail there may be no /dev/kvm. The first
/// call counts.
pub fn use_descriptor(number: RawFd) -> Result<(), KvmError> {
    let fd = inherited::duplicate(number).map_err(|_| KvmError::Handed(number))?;
    // SAFETY: the descriptor is ours alone and goes over to the new owner. If it is not KVM's, every ioctl on it fails.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    if kvm.get_api_version() < 0 {
        return Err(KvmError::Handed(number));
    }
    HANDED.get_or_init(|| Arc::new(kvm));
    Ok(())
}

/// Asks for [`Hypervisor::supported_cpuid`], if nobody has, and closes KVM again: there may never be a machine. What fails is told
/// when it is needed.
pub fn ask_for_cpuid() {
    if SUPPORTED.get().is_none()
        && let Ok(hypervisor) = Hypervisor::open()
    {
        let _ = hypervisor.supported_cpuid();
    }
}

impl Hypervisor {
    /// Opens /dev/kvm, or takes the descriptor that was handed in, and checks that it can do what every machine needs.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = match HANDED.get() {
            Some(kvm) => kvm.clone(),
            None => Arc::new(Kvm::new().map_err(KvmError::Open)?),
        };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version(version));
        }
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Missing(name));
            }
        }
        Ok(Hypervisor {
            kvm,
            ahead: RefCell::new(None),
        })
    }

    /// Does ahead of time what depends on nothing that is configured. What fails is tried again when it is needed, and
    /// told then.
    pub fn prepare(&self) {
        if self.ahead.borrow().is_some() {
            return;
        }
        self.begin_to_ask_for_cpuid(|| true);
        let blank = self.kvm.create_vm().ok();
        // In order to have it: nobody else is to wait for it, and no thread to be left.
        let _ = self.supported_cpuid();
        self.ahead.replace(blank.map(Ahead::Blank));
    }

    /// The same for a machine whose memory will be at `place`: a slot for memory that is set some time after KVM_CREATE_VM costs
    /// a grace period too. With its only vCPU, which `enter` has been in and out of, and no record of written pages.
    pub fn prepare_with(&self, place: Place, enter: impl FnOnce(VcpuFd) -> Option<VcpuFd>) {
        let fitted = || {
            let vm = fit(self.new_vm().ok()?, place.memory(), false).ok()?;
            let fd = enter(vm.create_vcpu(0).ok()?.fd)?;
            vm.first.set(Some(Fresh { fd, has: None }));
            Some(vm)
        };
        let vm = fitted();
        self.ahead.replace(vm.map(|vm| Ahead::Fitted(place, vm)));
    }

    /// Asks for [`Self::supported_cpuid`]. Gives it to the vCPU of [`Self::prepare_with`], as it will have it unless a template says
    /// other, and looks up what that has then: that need not be set again. What fails is left as it was.
    pub fn prepare_vcpu(&self) {
        let _ = self.supported_cpuid();
        let ahead = self.ahead.borrow();
        let Some(Ahead::Fitted(_, vm)) = &*ahead else {
            return;
        };
        let first = vm.first.take().map(|Fresh { fd, has }| Fresh {
            has: has.or_else(|| self.with_cpuid(&fd).map(Box::new)),
            fd,
        });
        vm.first.set(first);
    }

    fn with_cpuid(&self, vcpu: &VcpuFd) -> Option<VcpuState> {
        let only = Topology {
            vcpus: 1,
            threads: 1,
        };
        let supported = self.supported_cpuid().ok()?;
        let cpuid = cpuid::for_vcpu(supported, only, 0, self.has_tsc_deadline());
        vcpu.set_cpuid2(&cpuid).ok()?;
        let leaves: Vec<_> = cpuid.as_slice().iter().map(CpuidLeaf::from).collect();
        state::save(vcpu, &leaves, &self.restorable()).ok()
    }

    /// What [`Self::prepare_with`] was given, if that machine is still to be had.
    pub fn prepared_place(&self) -> Option<Place> {
        match &*self.ahead.borrow() {
            Some(Ahead::Fitted(place, _)) => Some(place.clone()),
            Some(Ahead::Blank(_)) | None => None,
        }
    }

    fn new_vm(&self) -> Result<VmFd, KvmError> {
        call("KVM_CREATE_VM", self.kvm.create_vm())
    }

    /// Has a thread of its own ask for [`Self::supported_cpuid`], unless that is known or asked for: on a host that is itself a guest
    /// it takes as long as to make a machine, since each leaf is an exit to that host's. What fails is asked again when it is
    /// needed, and told then.
    ///
    /// Both meet before they go on: the kernel starts a thread where its parent runs, more often than not, but whom it wakes it
    /// puts where nobody runs. `confine` is for a thread that does not inherit a filter.
    pub fn begin_to_ask_for_cpuid(&self, confine: impl FnOnce() -> bool + Send + 'static) {
        let mut asking = ASKING.lock().unwrap_or_else(PoisonError::into_inner);
        if asking.is_some() || SUPPORTED.get().is_some() {
            return;
        }
        let kvm = self.kvm.clone();
        let both = Arc::new(Barrier::new(2));
        let other = both.clone();
        let thread = thread::Builder::new().name("cpuid".into()).spawn(move || {
            // First of all: whatever becomes of this thread, nobody waits for it here.
            other.wait();
            if reach::give_up_files().is_ok()
                && confine()
                && let Ok(cpuid) = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            {
                SUPPORTED.get_or_init(|| cpuid);
            }
        });
        if let Ok(thread) = thread {
            both.wait();
            *asking = Some(thread);
        }
    }

    /// CPUID that KVM can give a guest on this host. Asked once; slow on a host that is itself a guest.
    pub fn supported_cpuid(&self) -> Result<&CpuId, KvmError> {
        let asking = ASKING.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = asking {
            // A panic has ended the process already.
            drop(thread.join());
        }
        if let Some(cpuid) = SUPPORTED.get() {
            return Ok(cpuid);
        }
        let cpuid = call(
            "KVM_GET_SUPPORTED_CPUID",
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        )?;
        Ok(SUPPORTED.get_or_init(|| cpuid))
    }

    /// Whether KVM emulates the local APIC's deadline timer.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Whether KVM has the extension with this number.
    pub fn has_capability(&self, number: u32) -> bool {
        self.kvm
            .check_extension_raw(std::ffi::c_ulong::from(number))
            > 0
    }

    /// What KVM can save of a vCPU. Costs a call to the host's kernel: not for the way of a load.
    pub fn saveable(&self) -> Result<Saveable, KvmError> {
        let msrs = call("KVM_GET_MSR_INDEX_LIST", self.kvm.get_msr_index_list())?;
        Ok(Saveable {
            msrs: msrs.as_slice().to_vec(),
            ..self.restorable()
        })
    }

    /// The same without the list of MSRs, which a load does not need.
    pub fn restorable(&self) -> Saveable {
        let xsave = self.kvm.check_extension_int(Cap::Xsave2);
        Saveable {
            msrs: Vec::new(),
            xsave: usize::try_from(xsave).unwrap_or(0),
        }
    }

    /// Makes a machine with this memory and a local APIC for each vCPU to come. With `track_dirty` it can tell which
    /// pages its vCPUs wrote ([`Vm::dirty_log`]).
    ///
    /// The order matters: once there is an interrupt controller, each memory slot costs a grace period of the host
    /// kernel, several milliseconds.
    pub fn create_vm(&self, memory: &Memory, track_dirty: bool) -> Result<Vm, KvmError> {
        let mut ahead = self.ahead.borrow_mut();
        match ahead.take_if(|ahead| ahead.suits(memory, track_dirty)) {
            Some(Ahead::Fitted(_, vm)) => Ok(vm),
            Some(Ahead::Blank(fd)) => fit(fd, memory, track_dirty),
            None => {
                if let Some(other) = ahead.take() {
                    log::info!("another machine was made ready for: this one's start takes longer");
                    // To let go of it takes many grace periods: that is for the process's end.
                    std::mem::forget(other);
                }
                fit(self.new_vm()?, memory, track_dirty)
            }
        }
    }
}

/// Gives memory and local APICs to a machine that has nothing.
fn fit(fd: VmFd, memory: &Memory, track_dirty: bool) -> Result<Vm, KvmError> {
    let flags = if track_dirty {
        KVM_MEM_LOG_DIRTY_PAGES
    } else {
        0
    };
    for (slot, region) in memory.iter().enumerate() {
        let slot_bytes = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is `region`'s: a mapping, or addresses kept for one ([`Place`]). Slots do not overlap because regions do not, and
        // `Machine` (before it, `Ahead`) keeps the memory until every vCPU of this VM has stopped.
        let set = unsafe { fd.set_user_memory_region(slot_bytes) };
        call("KVM_SET_USER_MEMORY_REGION", set)?;
    }
    call("KVM_SET_TSS_ADDR", fd.set_tss_address(layout::TSS))?;
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        // Room for the routes of an I/O APIC, should there ever be any.
        args: [ioapic::MAX_PINS as u64, 0, 0, 0],
        ..Default::default()
    };
    call("KVM_CAP_SPLIT_IRQCHIP", fd.enable_cap(&split))?;
    Ok(Vm {
        fd: Arc::new(fd),
        first: Cell::new(None),
    })
}

/// One virtual machine in KVM.
pub struct Vm {
    fd: Arc<VmFd>,
    /// vCPU 0, if it was made ahead.
    first: Cell<Option<Fresh>>,
}

impl Vm {
    /// Makes vCPU `id`; the APIC id is the same number.
    pub fn create_vcpu(&self, id: u8) -> Result<Fresh, KvmError> {
        if id == 0
            && let Some(ready) = self.first.take()
        {
            return Ok(ready);
        }
        let fd = call("KVM_CREATE_VCPU", self.fd.create_vcpu(u64::from(id)))?;
        Ok(Fresh { fd, has: None })
    }

    /// Lets writes of `queue` to the notify register of the page at `page` fire `kick` without an exit to us.
    pub fn register_kick(&self, page: u64, queue: u32, kick: &EventFd) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(page + QUEUE_NOTIFY);
        call(
            "KVM_IOEVENTFD",
            self.fd.register_ioevent(kick, &address, queue),
        )
    }

    /// The pages of slot `slot`, `bytes` long, that vCPUs wrote since the last call: one bit each.
    pub fn dirty_log(&self, slot: u32, bytes: u64) -> Result<Vec<u64>, KvmError> {
        let bytes = usize::try_from(bytes).unwrap_or(0);
        call("KVM_GET_DIRTY_LOG", self.fd.get_dirty_log(slot, bytes))
    }

    /// The machine's kvm-clock. No vCPU may run.
    pub fn clock(&self) -> Result<ClockState, KvmError> {
        let clock = call("KVM_GET_CLOCK", self.fd.get_clock())?;
        let realtime = match clock.flags & KVM_CLOCK_REALTIME != 0 {
            true => clock.realtime,
            // KVM tells both together only where vCPUs' time stamp counters agree. A moment later is near enough.
            false => time_on(ClockId::Realtime).as_nanos() as u64,
        };
        Ok(ClockState {
            nanoseconds: clock.clock,
            realtime: Some(realtime),
        })
    }

    /// Sets the kvm-clock; with `catch_up`, ahead by the time that has passed since it was saved, where that is known.
    pub fn set_clock(&self, clock: &ClockState, catch_up: bool) -> Result<(), KvmError> {
        let realtime = clock.realtime.filter(|_| catch_up);
        let data = kvm_clock_data {
            clock: clock.nanoseconds,
            flags: realtime.map_or(0, |_| KVM_CLOCK_REALTIME),
            realtime: realtime.unwrap_or(0),
            ..Default::default()
        };
        call("KVM_SET_CLOCK", self.fd.set_clock(&data))
    }

    /// A way to send messages to the local APICs.
    pub fn msi_sink(&self) -> Box<dyn MsiSink> {
        Box::new(LocalApics(self.fd.clone()))
    }
}

/// A machine's kvm-clock, as saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Nanoseconds that the guest has seen.
    pub nanoseconds: u64,
    /// The host's wall clock at that moment, in nanoseconds; none in snapshots of old on a KVM that did not tell.
    pub realtime: Option<u64>,
}

struct LocalApics(Arc<VmFd>);

impl MsiSink for LocalApics {
    fn send(&self, address: u64, data: u32) {
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        if let Err(error) = self.0.signal_msi(message) {
            lepton_devices::guest_warn!("interrupt {data:#x} to {address:#x} lost: {error}");
        }
    }
}

/// Whether this processor has hardware virtualization that a VMM can use (AMD SVM or Intel VMX).
pub fn is_hardware_virtualized() -> bool {
    use std::arch::x86_64::__cpuid;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    __cpuid(1).ecx & VMX != 0 || __cpuid(0x8000_0001).ecx & SVM != 0
}
