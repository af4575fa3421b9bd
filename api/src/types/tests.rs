use proptest::prelude::*;

use super::*;

fn read<T: serde::de::DeserializeOwned>(json: &str) -> Result<T, String> {
    serde_json::from_str(json).map_err(|error| error.to_string())
}

fn text<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

#[test]
fn bitmaps() {
    let bitmap: Bitmap32 = text("0b1_0x1").unwrap();
    assert_eq!((bitmap.mask, bitmap.value), (0b1101, 0b1001));
    assert_eq!(bitmap.apply(0b0110), 0b1011);
    assert_eq!(text::<Bitmap32>("x1"), Some(Bitmap32 { mask: 1, value: 1 }));
    assert_eq!(text::<Bitmap32>(""), Some(Bitmap32::default()));
    assert!(text::<Bitmap32>(&"1".repeat(32)).is_some());
    assert!(text::<Bitmap32>(&"1".repeat(33)).is_none());
    assert!(text::<Bitmap64>(&"1".repeat(64)).is_some());
    assert!(text::<Bitmap64>(&"x".repeat(65)).is_none());
    let error = read::<Bitmap64>(r#""0b012""#).unwrap_err();
    assert!(error.contains("has the character '2'"), "{error}");
}

#[test]
fn numbers_with_a_prefix() {
    let leaf = |text: &str| {
        read::<CpuidLeafModifier>(&format!(
            r#"{{"leaf": "{text}", "subleaf": "0x0", "flags": 0, "modifiers": []}}"#
        ))
        .map(|modifier| modifier.leaf)
    };
    assert_eq!(leaf("0x80000001"), Ok(0x8000_0001));
    assert_eq!(leaf("0b101"), Ok(5));
    assert!(leaf("5").unwrap_err().contains("no number with the prefix"));
    assert!(
        leaf("0x100000000")
            .unwrap_err()
            .contains("no 32-bit number")
    );
}

#[test]
fn kvm_capabilities() {
    assert_eq!(text("121"), Some(KvmCapability::Add(121)));
    assert_eq!(text("!121"), Some(KvmCapability::Remove(121)));
    for bad in ["", "!", "-1", "x", "4294967296"] {
        assert_eq!(text::<KvmCapability>(bad), None, "{bad}");
    }
}

#[test]
fn mac_addresses() {
    assert_eq!(
        text("06:00:AC:10:00:02"),
        Some(MacAddr([6, 0, 0xac, 0x10, 0, 2]))
    );
    for bad in [
        "",
        "06:00:ac:10:00",
        "06:00:ac:10:00:02:03",
        "6:00:ac:10:00:02",
        "06:00:ac:10:00:+2",
        "06-00-ac-10-00-02",
        "06:00:ac:10:00:0é",
        "06:00:ac:10:00:",
        "06:00:ac:10:00:002",
        " 06:00:ac:10:00:02",
    ] {
        assert_eq!(text::<MacAddr>(bad), None, "{bad}");
    }
    let error = read::<MacAddr>(r#""nonsense""#).unwrap_err();
    assert!(
        error.contains("The provided MAC address is invalid: \"nonsense\""),
        "{error}"
    );
}

#[test]
fn log_levels() {
    assert_eq!(read(r#""WARNING""#), Ok(LogLevel::Warn));
    assert_eq!(read(r#""warn""#), Ok(LogLevel::Warn));
    assert_eq!(read(r#""off""#), Ok(LogLevel::Off));
    assert!(
        read::<LogLevel>(r#""loud""#)
            .unwrap_err()
            .contains("\"loud\"")
    );
    assert_eq!(
        log::LevelFilter::from(LogLevel::Trace),
        log::LevelFilter::Trace
    );
}

#[test]
fn machine_config_leaves_out_an_absent_template() {
    let json = serde_json::to_string(&MachineConfig::default()).unwrap();
    assert_eq!(
        json,
        r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#
    );
}

proptest! {
    #[test]
    fn texts_never_panic_and_what_is_read_is_written_the_same(any in "\\PC{0,70}|[01x_]{0,70}|!?[0-9]{0,11}|([0-9a-f]{2}:){5}[0-9a-f]{2}") {
        if let Some(value) = text::<Bitmap32>(&any) {
            prop_assert_eq!(text(&value.to_string()), Some(value));
        }
        if let Some(value) = text::<Bitmap64>(&any) {
            prop_assert_eq!(text(&value.to_string()), Some(value));
        }
        if let Some(value) = text::<MacAddr>(&any) {
            prop_assert_eq!(value.to_string(), any.to_lowercase());
        }
        if let Some(value) = text::<KvmCapability>(&any) {
            prop_assert_eq!(text(&value.to_string()), Some(value));
        }
    }

    #[test]
    fn bitmap_forces_exactly_its_bits(mask: u32, value: u32, register: u32) {
        let bitmap = Bitmap32 { mask, value: value & mask };
        let read: Bitmap32 = bitmap.to_string().parse().unwrap();
        prop_assert_eq!(read, bitmap);
        let changed = read.apply(register);
        prop_assert_eq!(changed & mask, value & mask);
        prop_assert_eq!(changed & !mask, register & !mask);
    }
}
