//! Custom CPU templates: which bits of CPUID leaves and MSRs are forced to what.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::string_on_the_wire;

/// Body of `PUT /cpu-config`.
///
/// The fields of the specification that exist on aarch64 only (`reg_modifiers`, `vcpu_features`) are unknown here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// KVM capabilities to demand in addition, or not to demand.
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes to CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidLeafModifier>,
    /// Changes to model-specific registers.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A KVM capability number (`KVM_CAP_*`); `"!56"` on the wire removes it from what the VMM demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// Demand it.
    Add(u32),
    /// Do not demand it.
    Remove(u32),
}

/// Changes to the registers of one CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidLeafModifier {
    /// EAX on entry; `"0x…"` or `"0b…"` on the wire.
    #[serde(with = "prefixed")]
    pub leaf: u32,
    /// ECX on entry; `"0x…"` or `"0b…"` on the wire.
    #[serde(with = "prefixed")]
    pub subleaf: u32,
    /// `KVM_CPUID_FLAG_*` of the leaf.
    pub flags: u32,
    /// The changes.
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// Changes to one register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidRegisterModifier {
    /// The register.
    pub register: CpuidRegister,
    /// Its bits.
    pub bitmap: Bitmap32,
}

/// The registers in which CPUID answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes to one model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number; `"0x…"` or `"0b…"` on the wire.
    #[serde(with = "prefixed")]
    pub addr: u32,
    /// Its bits.
    pub bitmap: Bitmap64,
}

/// A text that is no KVM capability, number or bitmap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuConfigError {
    /// Not a number with an optional `!` before it.
    #[error("{0:?} is no KVM capability number: {1}")]
    Capability(String, ParseIntError),
    /// Neither `0x` nor `0b` stands before the number.
    #[error("{0:?} is no number with the prefix 0x or 0b")]
    Prefix(String),
    /// The digits do not form a 32-bit number.
    #[error("{0:?} is no 32-bit number: {1}")]
    Number(String, ParseIntError),
    /// More digits than the register has bits.
    #[error("bitmap {text:?} is longer than {bits} bits")]
    BitmapLength {
        /// The bitmap.
        text: String,
        /// Size of the register.
        bits: u32,
    },
    /// A character other than 0, 1, x and _.
    #[error("bitmap {text:?} has the character {character:?}, expected 0, 1, x or _")]
    BitmapCharacter {
        /// The bitmap.
        text: String,
        /// The character.
        character: char,
    },
}

impl FromStr for KvmCapability {
    type Err = CpuConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |digits: &str| {
            digits
                .parse()
                .map_err(|error| CpuConfigError::Capability(text.to_owned(), error))
        };
        match text.strip_prefix('!') {
            Some(digits) => Ok(Self::Remove(number(digits)?)),
            None => Ok(Self::Add(number(text)?)),
        }
    }
}

impl fmt::Display for KvmCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(number) => write!(f, "{number}"),
            Self::Remove(number) => write!(f, "!{number}"),
        }
    }
}

string_on_the_wire!(KvmCapability);

/// A number that is a string with a radix prefix on the wire.
mod prefixed {
    use super::*;

    pub fn serialize<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        parse(&text).map_err(serde::de::Error::custom)
    }

    fn parse(text: &str) -> Result<u32, CpuConfigError> {
        let (digits, radix) = if let Some(digits) = text.strip_prefix("0x") {
            (digits, 16)
        } else if let Some(digits) = text.strip_prefix("0b") {
            (digits, 2)
        } else {
            return Err(CpuConfigError::Prefix(text.to_owned()));
        };
        u32::from_str_radix(digits, radix)
            .map_err(|error| CpuConfigError::Number(text.to_owned(), error))
    }
}

/// Reads `0`, `1` and `x` (leave alone), most significant bit first; `_` may stand anywhere. Returns the bits that are
/// forced and what they are forced to. `bits` is at most 64.
fn parse_bitmap(text: &str, bits: u32) -> Result<(u64, u64), CpuConfigError> {
    let digits = text.strip_prefix("0b").unwrap_or(text);
    let (mut mask, mut value) = (0u64, 0u64);
    let mut position = 0;
    for character in digits.chars().rev() {
        if character == '_' {
            continue;
        }
        if position == bits {
            return Err(CpuConfigError::BitmapLength {
                text: text.to_owned(),
                bits,
            });
        }
        let bit = 1 << position;
        match character {
            'x' => {}
            '0' => mask |= bit,
            '1' => {
                mask |= bit;
                value |= bit;
            }
            character => {
                return Err(CpuConfigError::BitmapCharacter {
                    text: text.to_owned(),
                    character,
                });
            }
        }
        position += 1;
    }
    Ok((mask, value))
}

fn write_bitmap(f: &mut fmt::Formatter<'_>, mask: u64, value: u64, bits: u32) -> fmt::Result {
    f.write_str("0b")?;
    for position in (0..bits).rev() {
        f.write_str(match (mask >> position & 1, value >> position & 1) {
            (0, _) => "x",
            (_, 0) => "0",
            (_, _) => "1",
        })?;
    }
    Ok(())
}

macro_rules! bitmap {
    ($name:ident, $integer:ty) => {
        /// Bits of a register that are forced, and what they are forced to.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            /// 1 for each bit that is forced.
            pub mask: $integer,
            /// The forced bits, 0 elsewhere.
            pub value: $integer,
        }

        impl $name {
            /// The register after the change.
            pub fn apply(self, register: $integer) -> $integer {
                register & !self.mask | self.value
            }
        }

        impl FromStr for $name {
            type Err = CpuConfigError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let (mask, value) = parse_bitmap(text, <$integer>::BITS)?;
                // No bit past the register's size is ever set, so nothing is cut off.
                Ok(Self {
                    mask: mask as $integer,
                    value: value as $integer,
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_bitmap(
                    f,
                    u64::from(self.mask),
                    u64::from(self.value),
                    <$integer>::BITS,
                )
            }
        }

        string_on_the_wire!($name);
    };
}

bitmap!(Bitmap32, u32);
bitmap!(Bitmap64, u64);
