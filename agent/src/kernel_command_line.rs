//! What the kernel's command line says to us.

/// The parameters that matter here.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `quiet`: print errors only.
    pub quiet: bool,
    /// `lepton.hostname=NAME`.
    pub hostname: Option<String>,
    /// There is an `ip=`: the kernel has set up the network, or tried to.
    pub ip: bool,
}

impl Parameters {
    /// Reads `/proc/cmdline`.
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(line: &str) -> Self {
        let mut parameters = Self::default();
        // What follows "--" is for init alone.
        for word in line
            .split_ascii_whitespace()
            .take_while(|word| *word != "--")
        {
            match word.split_once('=') {
                None if word == "quiet" => parameters.quiet = true,
                Some(("lepton.hostname", name)) if !name.is_empty() => {
                    parameters.hostname = Some(name.to_owned());
                }
                Some(("ip", _)) => parameters.ip = true,
                _ => {}
            }
        }
        parameters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_among_others() {
        let line = "console=ttyS0 quiet root=/dev/vda lepton.hostname=web1 ip=dhcp -- -x\n";
        assert_eq!(
            Parameters::parse(line),
            Parameters {
                quiet: true,
                hostname: Some("web1".into()),
                ip: true,
            }
        );
        assert_eq!(
            Parameters::parse("noquiet quiet=1 lepton.hostname= -- quiet"),
            Parameters::default()
        );
    }
}
