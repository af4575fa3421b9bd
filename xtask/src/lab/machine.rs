//! The processes of one lab: QEMU's software CPU and, for the host's files, virtiofsd.
//!
//! Every wire between us and them is an inherited file descriptor, so that a lab leaves nothing in the file system.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use rustix::fs::{MemfdFlags, memfd_create};

/// Where Debian keeps the program that serves the host's files.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Its kernel command line. The lab is torn down as a whole, so it needs no mitigations, and a panic ends it at once.
/// The self-tests of the kernel's ciphers would be half of the boot. Debian's kernel clears memory when it is given out, and a huge
/// page once more for who touches it: 2 ms each here.
const COMMAND_LINE: &str = "console=ttyS0 quiet reboot=k panic=-1 mitigations=off tsc=reliable \
                            no_timer_check lpj=5200000 cryptomgr.notests init_on_alloc=0";

/// A lab whose kernel stands still for a minute panics, with what each processor was at, rather than to go on until somebody
/// ends it. A command in it cannot do that; QEMU was seen to, about once in two hundred labs (`start.sh` has one cause).
const STANDSTILL: &str = "softlockup_panic=1 watchdog_thresh=30 panic_print=0x40";

/// Processors that no program runs on, and with it no guest: the first. Whenever any other loads the state of its x87 unit, as
/// at every change of task, QEMU clears a flag of the first one (`cpu_clear_ignne`) in a word that also says whether it is
/// in a guest and takes interrupts, without a lock. An entry or an exit of a guest at that moment is half undone: guests end
/// in triple faults or hang, or the lab's kernel takes an interrupt where there can be none, and panics. Debian's QEMU 7.2
/// does so, and 10.0.
const WITHOUT_PROGRAMS: u32 = 1;

/// The others join when the devices have their places (`init.sh`). While QEMU 7.2 moves the memory of a device, what
/// another processor writes to its interrupt controller may go to no device at all, and QEMU ends by a segmentation fault.
const FIRST_ALONE: &str = "maxcpus=1";

/// What is added for a lab whose clock is the host's time stamp counter, as QEMU hands it through. On a busy host the
/// kernel inside was seen to fail at measuring its frequency: the timers that it measures it by stand still while QEMU
/// waits for a processor. With a wrong frequency the lab's clock would run at another pace than time, and deadlines in it
/// would pass too early.
fn clock(cpuinfo: &str) -> String {
    tsc_khz(cpuinfo).map_or_else(String::new, |khz| format!(" tsc_early_khz={khz}"))
}

/// The frequency of the host's time stamp counter in kHz, from the text of `/proc/cpuinfo`: Linux derives its BogoMIPS
/// from it where it is constant, 2 for each MHz.
fn tsc_khz(cpuinfo: &str) -> Option<u32> {
    let value = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim())
    };
    value("flags")?
        .split(' ')
        .find(|flag| *flag == "constant_tsc")?;
    let (whole, hundredths) = value("bogomips")?.split_once('.')?;
    let hundredths = whole
        .parse::<u32>()
        .ok()?
        .checked_mul(100)?
        .checked_add(hundredths.parse().ok()?)?;
    hundredths.checked_mul(5)
}

/// QEMU's processor: AMD's with virtualization. Without five-level page tables, each level of which costs an emulated
/// page walk twice under nested paging.
const PROCESSOR: &str = "max,+svm,+npt,-la57";

/// Numbers the descriptors have in QEMU.
mod fd {
    pub const INITRD: i32 = 10;
    pub const HOST_FILES: i32 = 11;
    pub const CONSOLE: i32 = 12;
    pub const REPORT: i32 = 13;
    pub const INPUT: i32 = 14;
    pub const OUTPUT: i32 = 15;
    pub const ERROR: i32 = 16;
}

/// How the command inside is wired to us.
pub enum Wiring {
    /// virtio-serial ports for stdin, stdout and stderr.
    Ports,
    /// One virtio console: a terminal.
    Terminal,
    /// Serial ports: nothing of theirs depends on when the host gets to run. No stdin.
    Counted,
}

/// What to start.
pub struct Machine<'a> {
    pub kernel: &'a Path,
    pub initramfs: File,
    pub memory_mib: u32,
    pub cpus: u32,
    pub wiring: Wiring,
}

/// A running lab. Dropping it ends its processes.
pub struct Running {
    qemu: Process,
    virtiofsd: Option<Process>,
    /// The kernel's console.
    pub console: UnixStream,
    /// Lines from and to the lab's init.
    pub report: UnixStream,
    /// The command's stdin, or with [`Wiring::Terminal`] both directions of the terminal.
    pub input: Option<UnixStream>,
    /// The command's stdout and stderr.
    pub outputs: Option<(UnixStream, UnixStream)>,
}

impl Running {
    /// Ends the machine and returns what its processes complained about.
    pub fn end(&mut self) -> String {
        let mut complaints = self.qemu.end();
        if let Some(virtiofsd) = &mut self.virtiofsd {
            complaints.push_str(&virtiofsd.end());
        }
        complaints
    }
}

/// An anonymous file in memory.
pub fn memory_file(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MemfdFlags::CLOEXEC)?))
}

struct Process {
    child: Child,
    stderr: File,
}

impl Process {
    fn start(program: &str, args: Arguments) -> Result<Self> {
        let stderr = memory_file("stderr")?;
        let mut command = Command::new("setpriv");
        command
            // Whatever ends us, even SIGKILL, ends it.
            .args(["--pdeathsig", "KILL", "--", program])
            .args(args.words)
            .stdin(Stdio::null())
            .stdout(stderr.try_clone()?)
            .stderr(stderr.try_clone()?)
            .fd_mappings(
                args.fds
                    .into_iter()
                    .map(|(child_fd, parent_fd)| FdMapping {
                        parent_fd,
                        child_fd,
                    })
                    .collect(),
            )?;
        // Ctrl-C at the terminal is for us to handle.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command
            .spawn()
            .context("cannot start setpriv (Debian package util-linux)")?;
        Ok(Self { child, stderr })
    }

    fn end(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut text = Vec::new();
        if self
            .stderr
            .rewind()
            .and_then(|()| self.stderr.read_to_end(&mut text))
            .is_err()
        {
            return String::new();
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU's command line and the descriptors it names.
#[derive(Default)]
struct Arguments {
    words: Vec<OsString>,
    fds: Vec<(i32, OwnedFd)>,
}

impl Arguments {
    fn words(&mut self, words: &str) {
        self.words.extend(words.split(' ').map(OsString::from));
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.words
            .extend([OsStr::new(name), value.as_ref()].map(OsString::from));
    }

    /// A character device `id` whose other end is ours.
    fn wire(&mut self, id: &str, number: i32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.fds.push((number, OwnedFd::from(theirs)));
        self.option("-chardev", format!("socket,id={id},fd={number}"));
        Ok(ours)
    }
}

impl Machine<'_> {
    /// Starts QEMU, and virtiofsd unless the machine is counted.
    pub fn start(self) -> Result<Running> {
        let mut args = Arguments::default();
        let counted = matches!(self.wiring, Wiring::Counted);
        args.words("-nodefaults -no-user-config -display none -no-reboot");
        args.option("-cpu", PROCESSOR);
        args.option("-m", self.memory_mib.to_string());
        args.option("-kernel", self.kernel);
        args.option("-initrd", format!("/proc/self/fd/{}", fd::INITRD));
        args.fds.push((fd::INITRD, OwnedFd::from(self.initramfs)));
        let more = if counted {
            " nokaslr".to_owned()
        } else {
            let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            format!(" {FIRST_ALONE} {STANDSTILL}{}", clock(&cpuinfo))
        };
        args.option("-append", format!("{COMMAND_LINE}{more}"));

        let console = args.wire("console", fd::CONSOLE)?;
        args.words("-serial chardev:console");
        let report = args.wire("report", fd::REPORT)?;
        let input = match self.wiring {
            Wiring::Counted => None,
            Wiring::Ports | Wiring::Terminal => Some(args.wire("in", fd::INPUT)?),
        };
        let outputs = match self.wiring {
            Wiring::Terminal => None,
            Wiring::Ports | Wiring::Counted => {
                Some((args.wire("out", fd::OUTPUT)?, args.wire("err", fd::ERROR)?))
            }
        };
        let virtiofsd = if counted {
            counted_devices(&mut args);
            None
        } else {
            args.words("-accel tcg,thread=multi");
            args.option("-smp", (self.cpus + WITHOUT_PROGRAMS).to_string());
            args.option(
                "-object",
                format!(
                    "memory-backend-memfd,id=memory,size={}M,share=on",
                    self.memory_mib
                ),
            );
            args.words("-machine pc,memory-backend=memory");
            virtio_ports(&mut args, &self.wiring);
            Some(host_files(&mut args)?)
        };
        Ok(Running {
            qemu: Process::start("qemu-system-x86_64", args)?,
            virtiofsd,
            console,
            report,
            input,
            outputs,
        })
    }
}

fn counted_devices(args: &mut Arguments) {
    args.words("-machine pc -accel tcg,thread=single -icount shift=0,sleep=off -smp 1");
    // The clock and the random numbers are the same in every run.
    args.words("-rtc base=2024-01-01,clock=vm -seed 1");
    args.words("-serial chardev:out -serial chardev:err -serial chardev:report");
}

fn virtio_ports(args: &mut Arguments, wiring: &Wiring) {
    args.words("-device virtio-serial-pci,max_ports=8");
    if matches!(wiring, Wiring::Terminal) {
        args.words("-device virtconsole,chardev=in,nr=0");
    } else {
        args.words("-device virtserialport,chardev=in,nr=1");
        args.words("-device virtserialport,chardev=out,nr=2");
        args.words("-device virtserialport,chardev=err,nr=3");
    }
    args.words("-device virtserialport,chardev=report,nr=4");
}

/// Starts virtiofsd on the host's root and connects QEMU to it.
fn host_files(args: &mut Arguments) -> Result<Process> {
    // virtiofsd wants to accept a connection. It is made here, so the socket's name lives for a moment only.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("virtiofsd");
    let listener = UnixListener::bind(&path)?;
    let connection = UnixStream::connect(&path)?;
    drop(folder);

    args.fds.push((fd::HOST_FILES, OwnedFd::from(connection)));
    args.option("-chardev", format!("socket,id=host,fd={}", fd::HOST_FILES));
    args.words("-device vhost-user-fs-pci,chardev=host,tag=host,queue-size=1024");

    let mut server = Arguments::default();
    // Its other sandbox, a mount namespace, cannot export the root itself. What the lab has read of a file stays in its page
    // cache (cache=always): otherwise each open of a file, and so each start of a program, would have all of it read again,
    // here and in all processes that have it mapped. What others change in the host's files meanwhile may go unseen.
    server.words("-f -o source=/ -o sandbox=chroot -o cache=always -o log_level=warn --fd=10");
    server.fds.push((10, OwnedFd::from(listener)));
    Process::start(VIRTIOFSD, server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_the_one_linux_found() {
        let cpuinfo = "processor\t: 0\nflags\t\t: fpu tsc constant_tsc\nbogomips\t: 4199.99\n\nprocessor\t: 1\n";
        assert_eq!(clock(cpuinfo), " tsc_early_khz=2099995");
        // Without a constant rate, or on a machine that says something else, the kernel has to measure.
        assert_eq!(clock(&cpuinfo.replace("constant_tsc", "")), "");
        assert_eq!(clock("flags : constant_tsc\nbogomips : many\n"), "");
        assert_eq!(clock(""), "");
    }
}
