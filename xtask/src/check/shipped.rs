//! The VMM as it is shipped: how large it is, and whether what runs at the start lies together.

use std::fs;

use anyhow::{Context, Result, ensure};
use object::LittleEndian;
use object::elf::FileHeader64;
use object::read::elf::{FileHeader, SectionHeader};

use super::counts::Counts;
use crate::programs::{Profile, Programs};
use crate::progress::Progress;

/// What this check is called on the command line.
pub const NAME: &str = "shipped";

/// Most bytes of the program.
const MOST: usize = 3 << 20;
/// The section that vmm/order.ld makes, and its least bytes: it has three quarters of a MiB, and less and less of it if names in
/// that script no longer match.
const FIRST: &str = ".text.first";
const LEAST: u64 = 512 << 10;

/// Builds it and looks.
pub fn run(progress: &Progress) -> Result<Counts> {
    let programs = Programs::build(progress, Profile::Release, &["lepton-vmm"])?;
    let path = programs.path("lepton-vmm")?;
    let program = fs::read(path).with_context(|| path.display().to_string())?;
    let first = size_of(&program, FIRST).with_context(|| path.display().to_string())?;
    eprintln!(
        "lepton-vmm has {} KiB, {FIRST} {} of them",
        program.len() >> 10,
        first >> 10
    );
    ensure!(
        program.len() <= MOST,
        "lepton-vmm has {} bytes, more than {MOST}",
        program.len()
    );
    ensure!(
        first >= LEAST,
        "{FIRST} has {first} bytes, less than {LEAST}: the names in vmm/order.ld match too little"
    );
    Ok(Counts::one(true))
}

/// Bytes of the section `name`, 0 if there is none.
fn size_of(program: &[u8], name: &str) -> Result<u64, object::read::Error> {
    let endian = LittleEndian;
    let header = FileHeader64::<LittleEndian>::parse(program)?;
    let sections = header.sections(endian, program)?;
    let found = sections.section_by_name(endian, name.as_bytes());
    Ok(found.map_or(0, |(_, section)| section.sh_size(endian)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_found_by_name() {
        let ours = fs::read("/proc/self/exe").unwrap();
        assert!(size_of(&ours, ".text").unwrap() > 0);
        assert_eq!(size_of(&ours, ".none").unwrap(), 0);
        assert!(size_of(b"no program", ".text").is_err());
    }
}
