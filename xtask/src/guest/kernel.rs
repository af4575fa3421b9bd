//! The guest's kernel: Debian's kernel source with our configuration and patches.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{elf, recipe};
use crate::cache::{Cache, Inputs};
use crate::packages;
use crate::progress::{Progress, Step};

/// The package with the source, which installs `/usr/src/<name>.tar.xz`.
const SOURCE: &str = "linux-source-6.1";
/// What a build needs. zstd packs the bzImage; libelf is for the kernel's own objtool.
const PACKAGES: [&str; 12] = [
    SOURCE,
    "gcc",
    "libc6-dev",
    "make",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "patch",
    "tar",
    "xz-utils",
    "zstd",
];
/// Counts with the way the kernel is built: a change makes every cached kernel stale.
const FORM: &str = "1";
/// Source files compiled, roughly: for the progress shown.
const OBJECTS: usize = 1300;
/// Lines of the build's log that are shown when it fails.
const TAIL: usize = 40;
/// Parts of the source that no configuration of ours compiles, and that no Kconfig file is in.
const UNUSED: [&str; 10] = [
    "*/Documentation/*/*",
    "*/tools/testing/*",
    "*/tools/perf/*",
    "*/drivers/gpu/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/drivers/scsi/*.[ch]",
    "*/drivers/staging/*.[ch]",
    "*/sound/*.[ch]",
];

/// Bounds of the results' sizes, in bytes: what is loaded and copied at every boot.
const MAX_VMLINUX: u64 = 14 << 20;
const MAX_BZIMAGE: u64 = 4 << 20;

/// The guest kernel, built.
#[derive(Debug, Clone)]
pub struct KernelPaths {
    /// The ELF file, without symbols and padding.
    pub vmlinux: PathBuf,
    /// The compressed image.
    pub bzimage: PathBuf,
    /// The whole configuration it was built with.
    pub config: PathBuf,
}

/// Builds the guest kernel, or finds it in the cache. Building takes about ten CPU minutes.
///
/// # Errors
/// If a Debian package is missing and cannot be installed, or the build fails; then the text ends with the end of the
/// build's log and names the file with all of it.
pub fn kernel(progress: &Progress) -> Result<KernelPaths> {
    packages::ensure(progress, "the guest kernel", &PACKAGES)?;
    let recipe = Recipe::read()?;
    let mut inputs = Inputs::new();
    for patch in &recipe.patches {
        // By its name alone, for the same key in every checkout.
        let name = patch.file_name().unwrap_or_default().to_string_lossy();
        inputs = inputs.with(&name, fs::read(patch)?);
    }
    let inputs = inputs
        .with("form", FORM)
        .with("config", &recipe.fragment)
        .with(
            "source",
            first_line("dpkg-query", &["--show", "--showformat=${Version}", SOURCE])?,
        )
        .with("compiler", first_line("gcc", &["--version"])?)
        .with("linker", first_line("ld", &["--version"])?);
    let folder = Cache::open()?.get_or_make("guest-kernel", inputs, |folder| {
        build(folder, &recipe, progress)
    })?;
    Ok(KernelPaths {
        vmlinux: folder.join("vmlinux"),
        bzimage: folder.join("bzImage"),
        config: folder.join("config"),
    })
}

/// What the kernel is made from, besides Debian's source.
struct Recipe {
    fragment: String,
    patches: Vec<PathBuf>,
}

impl Recipe {
    fn read() -> Result<Self> {
        let path = recipe("kernel.config");
        let fragment =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let folder = recipe("patches");
        let mut patches = fs::read_dir(&folder)
            .with_context(|| format!("cannot read {}", folder.display()))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>>>()?;
        patches.retain(|path| path.extension() == Some(OsStr::new("patch")));
        patches.sort();
        Ok(Self { fragment, patches })
    }
}

fn first_line(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.to_owned()),
        _ => bail!("{program} {}: {}", arguments.join(" "), output.status),
    }
}

/// Builds into `folder`, leaving only the results there.
fn build(folder: &Path, recipe: &Recipe, progress: &Progress) -> Result<()> {
    let tree = folder.join("tree");
    fs::create_dir(&tree)?;
    let mut unpack = Command::new("tar");
    unpack
        .args(["--extract", "--strip-components=1", "--directory"])
        .arg(&tree);
    unpack.args(UNUSED.map(|pattern| format!("--exclude={pattern}")));
    unpack
        .arg("--file")
        .arg(format!("/usr/src/{SOURCE}.tar.xz"));
    progress.run("unpacking the kernel source", &mut unpack)?;
    for patch in &recipe.patches {
        progress.run(
            &format!("applying {}", patch.display()),
            Command::new("patch")
                .args(["--strip=1", "--fuzz=0", "--directory"])
                .arg(&tree)
                .arg("--input")
                .arg(patch),
        )?;
    }

    let fragment = tree.join("lepton.config");
    fs::write(&fragment, &recipe.fragment)?;
    progress.run(
        "configuring the guest kernel",
        make(&tree)
            .arg("KCONFIG_ALLCONFIG=lepton.config")
            .arg("allnoconfig"),
    )?;
    let config = fs::read_to_string(tree.join(".config"))?;
    let dropped = dropped(&recipe.fragment, &config);
    if !dropped.is_empty() {
        bail!(
            "resources/guest/kernel.config: these lines have no effect, as a dependency is missing or something else \
             asks for the contrary:\n  {}",
            dropped.join("\n  ")
        );
    }
    compile(&tree, folder, progress)?;

    let linked = fs::read(tree.join("vmlinux"))?;
    fs::write(
        folder.join("vmlinux"),
        elf::pack(&linked).context("vmlinux")?,
    )?;
    fs::copy(tree.join("arch/x86/boot/bzImage"), folder.join("bzImage"))?;
    for (name, most) in [("vmlinux", MAX_VMLINUX), ("bzImage", MAX_BZIMAGE)] {
        let size = fs::metadata(folder.join(name))?.len();
        if size > most {
            bail!(
                "{name} has {size} bytes, and must not have more than {most}: something large came into kernel.config"
            );
        }
    }
    fs::write(folder.join("config"), config)?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}

/// `make` in the tree: the same kernel whoever builds it, when and where.
fn make(tree: &Path) -> Command {
    let mut command = Command::new("make");
    command.current_dir(tree).env("LC_ALL", "C");
    for name in [
        "MAKEFLAGS",
        "ARCH",
        "CROSS_COMPILE",
        "KCFLAGS",
        "KCPPFLAGS",
        "KBUILD_OUTPUT",
        "LOCALVERSION",
    ] {
        command.env_remove(name);
    }
    command.env("KBUILD_BUILD_TIMESTAMP", "1970-01-01");
    command
        .env("KBUILD_BUILD_USER", "lepton")
        .env("KBUILD_BUILD_HOST", "lepton");
    command.env("KBUILD_BUILD_VERSION", "1");
    command
}

fn compile(tree: &Path, folder: &Path, progress: &Progress) -> Result<()> {
    const WHAT: &str = "building the guest kernel";
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    // Beside the result, not in it: it is there after a failure as well.
    let log_path = folder.parent().unwrap_or(folder).join("guest-kernel.log");
    let step = progress.step(WHAT);
    let (reader, writer) = std::io::pipe()?;
    let mut child = make(tree)
        .arg(format!("--jobs={jobs}"))
        .args(["vmlinux", "bzImage"])
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .context("cannot start make")?;
    let tail = follow(reader, File::create(&log_path)?, &step)?;
    let status = child.wait()?;
    if !status.success() {
        step.failed();
        bail!(
            "{WHAT} failed: make ended with {status}\n{}\nAll of it: {}",
            Vec::from(tail).join("\n"),
            log_path.display()
        );
    }
    Ok(())
}

/// Copies a build's output to `log` while counting what is compiled; returns its last lines.
fn follow(
    output: impl std::io::Read,
    mut log: impl Write,
    step: &Step,
) -> Result<VecDeque<String>> {
    let mut tail = VecDeque::new();
    let mut compiled = 0usize;
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line)? > 0 {
        log.write_all(&line)?;
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if is_compilation(&text) {
            compiled += 1;
            step.note(&format!(
                "{compiled} of about {} files",
                OBJECTS.max(compiled)
            ));
        }
        if tail.len() == TAIL {
            tail.pop_front();
        }
        tail.push_back(text);
        line.clear();
    }
    Ok(tail)
}

/// Whether the kernel's build says with `line` that it compiles a file.
fn is_compilation(line: &str) -> bool {
    matches!(line.split_whitespace().next(), Some("CC" | "AS")) && line.starts_with("  ")
}

/// The lines of `fragment` that `config` contradicts.
fn dropped<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let set: std::collections::HashMap<&str, &str> = config
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .collect();
    fragment
        .lines()
        .filter(|line| match not_set(line) {
            Some(option) => set.contains_key(option),
            None if line.starts_with("CONFIG_") => line
                .split_once('=')
                .is_none_or(|(option, value)| set.get(option) != Some(&value)),
            None => false,
        })
        .collect()
}

/// The option of a line `# CONFIG_X is not set`.
fn not_set(line: &str) -> Option<&str> {
    line.strip_prefix("# ")?
        .strip_suffix(" is not set")
        .filter(|option| option.starts_with("CONFIG_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_without_effect_are_found() {
        let fragment = "# Why.\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_N=17\n# CONFIG_C is not set\n# CONFIG_D is not set\n\n";
        let config =
            "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_N=14\nCONFIG_C=y\n# CONFIG_D is not set\n";
        assert_eq!(
            dropped(fragment, config),
            ["CONFIG_B=y", "CONFIG_N=17", "# CONFIG_C is not set"]
        );
        assert_eq!(dropped(config, config), Vec::<&str>::new());
    }

    #[test]
    fn compilations_are_counted() {
        assert!(is_compilation("  CC      kernel/fork.o"));
        assert!(is_compilation("  AS      arch/x86/entry/entry_64.o"));
        assert!(!is_compilation("  LD      vmlinux"));
        assert!(!is_compilation("CC is not set"));
    }

    #[test]
    fn the_log_is_kept_whole_and_its_end_returned() {
        let text: String = (0..100).map(|n| format!("  CC      file{n}.o\n")).collect();
        let mut log = Vec::new();
        let tail = follow(text.as_bytes(), &mut log, &Progress::new().step("test")).unwrap();
        assert_eq!(log, text.as_bytes());
        assert_eq!(tail.len(), TAIL);
        assert_eq!(tail.back().unwrap(), "  CC      file99.o");
    }

    #[test]
    fn the_recipe_is_readable_and_in_order() {
        let recipe = Recipe::read().unwrap();
        assert!(
            recipe
                .fragment
                .contains("CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y")
        );
        assert!(recipe.patches.is_sorted());
        for line in recipe.fragment.lines() {
            let known = line.is_empty() || line.starts_with('#') || line.starts_with("CONFIG_");
            assert!(known, "kernel.config: {line}");
        }
    }
}
