//! Guests for bare metal, and what they say on the serial port.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::linux;
use crate::origin::Origin;
use crate::vmm::{Builder, Ended, Vmm};

/// A machine with a bare-metal guest, before it starts.
pub struct Metal {
    builder: Builder,
    config: Value,
}

impl Metal {
    /// The program that `variable` names the file of, with these arguments: 1 vCPU, 128 MiB, no devices.
    #[track_caller]
    pub fn new(variable: &str, arguments: &str) -> Self {
        Self {
            builder: Vmm::builder().without_api(),
            config: json!({
                "boot-source": { "kernel_image_path": linux::file(variable), "boot_args": arguments },
                "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
                "drives": [],
            }),
        }
    }

    /// Lets the VMM have an API, and a log apart from what the guest says.
    #[must_use]
    pub fn with_api(mut self) -> Self {
        let log = self.path("log").into_os_string();
        self.builder = self
            .builder
            .with_api()
            .arguments(["--log-path".into(), log]);
        self
    }

    /// Changes the configuration.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.config);
        self
    }

    /// The path of a file in the VMM's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.builder.directory().join(name)
    }

    /// Lets the guest be entered by the 64-bit Linux boot protocol: takes the note of the PVH entry out of the image.
    #[must_use]
    pub fn by_linux64(mut self) -> Self {
        // Length of the value, type PHYS32_ENTRY, name.
        const NOTE: &[u8] = b"\x04\0\0\0\x12\0\0\0Xen\0";
        let kernel = &mut self.config["boot-source"]["kernel_image_path"];
        let mut image = std::fs::read(kernel.as_str().expect("a path")).expect("an image");
        let at = image
            .windows(NOTE.len())
            .position(|bytes| bytes == NOTE)
            .expect("an image with a PVH entry");
        // Some other type.
        image[at + 4] = 0xff;
        let path = self.builder.directory().join("linux64");
        std::fs::write(&path, image).expect("a file can be written");
        *kernel = json!(path);
        self
    }

    /// Adds a drive that holds `content`, and returns its path.
    pub fn drive(&mut self, id: &str, engine: &str, content: &[u8]) -> PathBuf {
        let path = self.path(id);
        std::fs::write(&path, content).expect("a file can be written");
        let drives = self.config["drives"].as_array_mut().expect("a list");
        drives.push(json!({
            "drive_id": id,
            "path_on_host": path,
            "is_root_device": false,
            "is_read_only": false,
            "cache_type": "Writeback",
            "io_engine": engine,
        }));
        path
    }

    /// Starts the machine, in the way that the suite asks for.
    #[track_caller]
    pub fn start(mut self) -> Vmm {
        let origin = Origin::current();
        if origin != Origin::Booted {
            let arguments = &mut self.config["boot-source"]["boot_args"];
            *arguments = format!("{} metal.copied=1", arguments.as_str().expect("a text")).into();
        }
        origin.machine(self.builder, &self.config, |vmm, _| {
            vmm.stdout.wait_for("WAITS\n");
        })
    }

    /// Runs the machine until the guest resets it.
    #[track_caller]
    pub fn run(self) -> Ended {
        self.start().wait().expect_code(0)
    }
}

/// The JSON objects in the lines of `output` that begin with `mark`.
#[track_caller]
pub fn results(mark: &str, output: &str) -> Vec<Value> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix(mark))
        .map(|line| match serde_json::from_str(line) {
            Ok(value) => value,
            Err(error) => panic!("{line}: {error}"),
        })
        .collect()
}

/// What a drive has that the guests filled with their pattern, or expect it on: 64-bit words that depend on their place.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64 / 8)
        .flat_map(|word| {
            let word = word.wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.to_le_bytes()
        })
        .collect()
}
