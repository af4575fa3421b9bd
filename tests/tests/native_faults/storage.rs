//! A host's file system that is full.

use std::fs;
use std::process::Command;

use lepton_tests::metal::results;
use lepton_tests::{linux, programs};
use serde_json::json;

/// Runs a machine whose drive's files are on a file system of 1 MiB, in a mount namespace of its own: nothing is left of
/// it. Then checks the overlay, if there is one.
const SCRIPT: &str = r#"
set -e
mount -t tmpfs -o size=1M small "$1/small"
truncate -s 4M "$1/small/disk"
"$2" --no-api --config-file "$1/config.json"
if [ -e "$1/small/overlay" ]; then
    "$2" overlay check "$1/small/overlay" --base "$1/small/disk" >&2
fi
"#;

/// A guest writes four times as much as there is room for: what does not fit is an error of those requests, and of no
/// others. A request of 64 KiB that fits in part is a short write to the VMM.
pub fn a_full_file_system_is_an_error_to_the_guest_and_no_more() {
    for (engine, has_overlay) in [
        ("Sync", false),
        ("Async", false),
        ("Sync", true),
        ("Async", true),
    ] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("small")).expect("a directory");
        let arguments = "probe.mode=blk_write,blk_read probe.size=65536 probe.count=64 probe.qd=4";
        let mut config = json!({
            "boot-source": { "kernel_image_path": linux::file("LEPTON_PROBE"), "boot_args": arguments },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 32 },
            "drives": [{
                "drive_id": "d", "path_on_host": path("small/disk"), "is_root_device": false,
                "is_read_only": false, "cache_type": "Writeback", "io_engine": engine,
            }],
        });
        if has_overlay {
            config["drives"][0]["overlay"] = json!({ "path": path("small/overlay") });
        }
        fs::write(path("config.json"), config.to_string()).expect("a file can be written");
        let output = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                SCRIPT,
                "sh",
            ])
            .args([folder.path(), programs::vmm()])
            .output()
            .expect("unshare starts");
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{engine}, {has_overlay}: {errors}\n{text}"
        );
        let told = results("PROBE ", &text);
        assert_eq!(told.len(), 2, "{text}");
        let number = |at: usize, name: &str| told[at][name].as_u64().expect("a number");
        // A MiB has room for 16, less what the overlay itself needs.
        assert_eq!((number(0, "ops"), number(1, "ops")), (64, 64), "{text}");
        assert!(
            (48..64).contains(&number(0, "errors")),
            "{engine}, {has_overlay}: {text}"
        );
        assert_eq!(
            number(1, "errors"),
            0,
            "what cannot be written can be read: {text}"
        );
    }
}
