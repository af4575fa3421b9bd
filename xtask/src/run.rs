//! `cargo xtask run`: a command in a fresh microVM.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::guest;
use crate::host::Kvm;
use crate::lab::{self, Lab, Place, Streams};
use crate::programs::{Profile, Programs};
use crate::progress::Progress;

/// Where the microVM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// On this machine's KVM.
    Direct,
    /// In the lab.
    Lab,
    /// On this machine's KVM if it is of use, otherwise in the lab.
    Automatic,
}

/// Everything a microVM is made from.
pub struct Built {
    /// The guest's kernel.
    pub kernel: guest::KernelPaths,
    /// The guest's root image.
    pub image: PathBuf,
    /// Our programs.
    pub programs: Programs,
}

impl Built {
    /// Builds what is missing.
    pub fn get(progress: &Progress, profile: Profile) -> Result<Self> {
        // The agent is part of the image, which has to be small whatever the VMM's profile.
        let agent = Programs::build(progress, Profile::Release, &["lepton-agent"])?;
        let programs = Programs::build(
            progress,
            profile,
            &["lepton-vmm", "lepton-jailer", "lepton"],
        )?;
        Ok(Self {
            kernel: guest::kernel(progress)?,
            image: guest::image(progress, agent.path("lepton-agent")?)?,
            programs,
        })
    }
}

/// Builds everything, runs `command` in a microVM and returns its exit status.
pub fn run(
    choice: Choice,
    profile: Profile,
    options: Vec<OsString>,
    command: Vec<OsString>,
) -> Result<u8> {
    let in_lab = match choice {
        Choice::Direct => false,
        Choice::Lab => true,
        Choice::Automatic => match Kvm::of_this_machine().obstacle() {
            Some(obstacle) => {
                eprintln!("running in the lab: {obstacle}");
                true
            }
            None => false,
        },
    };
    if in_lab {
        // Better known before everything is built.
        lab::check_rights()?;
    }
    let progress = Progress::new();
    let built = Built::get(&progress, profile)?;
    let mut words: Vec<OsString> = vec![built.programs.path("lepton")?.into(), "run".into()];
    for (option, path) in [
        ("--vmm", built.programs.path("lepton-vmm")?),
        ("--kernel", &built.kernel.vmlinux),
        ("--image", &built.image),
    ] {
        words.extend([option.into(), path.into()]);
    }
    if choice == Choice::Direct {
        // Asked for by name: even a KVM that is of little use.
        words.push("--force".into());
    }
    words.extend(options);
    if !command.is_empty() {
        words.push("--".into());
        words.extend(command);
    }
    if in_lab {
        let lab = Lab {
            command: words,
            environment: lab::environment(&[]),
            place: Place::Host {
                directory: std::env::current_dir().context("cannot tell the working directory")?,
                shares: Vec::new(),
                cpus: 2,
            },
            memory_mib: lab::DEFAULT_MEMORY_MIB,
            timeout: None,
        };
        let outcome = lab.run(&Cache::open()?, &progress, Streams::inherited()?)?;
        return Ok(outcome.status);
    }
    let mut words = words.into_iter();
    let program = words.next().unwrap_or_default();
    let error = std::process::Command::new(&program).args(words).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
