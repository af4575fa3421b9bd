//! The real program, as an ordinary process on a Unix socket, driven by the real client.

mod agent;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::PathBuf;

use agent::{Agent, drain, exec, output, shell};
use lepton_agent::client::{CallError, Exec, ExecError, ExitStatus, Output, TerminalSize};

const SIGINT: u8 = 2;
const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;

#[test]
fn exit_codes() {
    let agent = Agent::start();
    for (program, code) in [("true", 0), ("false", 1)] {
        let process = agent.client.exec(&exec(&[program])).unwrap();
        assert_eq!(process.wait().unwrap(), ExitStatus::Exited(code));
    }
    let process = agent.client.exec(&shell("exit 255")).unwrap();
    assert_eq!(process.wait().unwrap(), ExitStatus::Exited(255));
}

#[test]
fn the_two_outputs_stay_apart() {
    let agent = Agent::start();
    let process = agent.client.exec(&shell("echo out; echo err >&2")).unwrap();
    assert_eq!(drain(&process, Output::Stdout), b"out\n");
    assert_eq!(drain(&process, Output::Stderr), b"err\n");
    assert_eq!(process.wait().unwrap(), ExitStatus::Exited(0));
    // Waited for and read to the end: the agent has forgotten it.
    assert!(matches!(process.wait(), Err(CallError::Refused(_))));
}

#[test]
fn signals_kill_and_are_told() {
    let agent = Agent::start();
    for signal in [SIGTERM, SIGKILL] {
        let process = agent.client.exec(&exec(&["cat"])).unwrap();
        assert!(process.signal(signal).unwrap());
        assert_eq!(process.wait().unwrap(), ExitStatus::Killed(signal));
        assert!(!process.signal(signal).unwrap());
    }
    let process = agent.client.exec(&exec(&["cat"])).unwrap();
    assert!(matches!(process.signal(200), Err(CallError::Refused(_))));
}

#[test]
fn ten_mebibytes_through_cat_and_back() {
    let agent = Agent::start();
    let process = agent.client.exec(&exec(&["cat"])).unwrap();
    let sent: Vec<u8> = (0..10 << 20).map(|i: u32| (i ^ (i >> 8)) as u8).collect();
    let (writer, bytes) = (process.clone(), sent.clone());
    let writing = std::thread::spawn(move || {
        assert!(writer.write_stdin(&bytes).unwrap());
        writer.close_stdin().unwrap();
    });
    assert!(drain(&process, Output::Stdout) == sent);
    writing.join().unwrap();
    assert_eq!(process.wait().unwrap(), ExitStatus::Exited(0));
}

#[test]
fn closing_stdin_leaves_stdout_open() {
    let agent = Agent::start();
    let process = agent
        .client
        .exec(&shell("cat >/dev/null; echo after"))
        .unwrap();
    assert!(process.write_stdin(b"before").unwrap());
    process.close_stdin().unwrap();
    assert_eq!(drain(&process, Output::Stdout), b"after\n");
    // Closed for good.
    assert!(!process.write_stdin(b"more").unwrap());
}

#[test]
fn writing_to_a_process_that_does_not_read_ends_with_it() {
    let agent = Agent::start();
    let process = agent.client.exec(&shell("exec sleep 1000")).unwrap();
    let writer = process.clone();
    // More than a pipe holds: this blocks until the process is killed.
    let writing = std::thread::spawn(move || writer.write_stdin(&[0; 1 << 20]));
    assert!(process.signal(SIGKILL).unwrap());
    assert!(!writing.join().unwrap().unwrap());
}

#[test]
fn output_waits_for_its_reader() {
    let agent = Agent::start();
    let process = agent
        .client
        .exec(&shell("head -c 3000000 /dev/zero"))
        .unwrap();
    // Whatever the order of exit and reads, nothing is lost.
    let length = drain(&process, Output::Stdout).len();
    assert_eq!(process.wait().unwrap(), ExitStatus::Exited(0));
    assert_eq!(length, 3_000_000);
}

#[test]
fn a_child_left_behind_does_not_hold_the_output_open() {
    let agent = Agent::start();
    let process = agent
        .client
        .exec(&shell("sleep 1000 & echo started $!"))
        .unwrap();
    let text = String::from_utf8(drain(&process, Output::Stdout)).unwrap();
    let pid = text.trim().strip_prefix("started ").unwrap().to_owned();
    assert_eq!(process.wait().unwrap(), ExitStatus::Exited(0));
    let (_, status) = output(&agent.client, &exec(&["kill", &pid]));
    assert_eq!(status, ExitStatus::Exited(0));
}

#[test]
fn orphans_are_reaped() {
    let agent = Agent::start();
    // The orphan is adopted by the agent, and ends when its standard input does.
    let process = agent
        .client
        .exec(&shell(
            "exec 3<&0; (cat <&3 >/dev/null & echo $!); exec sleep 1000",
        ))
        .unwrap();
    let pid = String::from_utf8(process.read(Output::Stdout).unwrap()).unwrap();
    let stat = format!("/proc/{}/stat", pid.trim());
    assert!(std::fs::metadata(&stat).is_ok());
    process.close_stdin().unwrap();
    // Seen as gone only once reaped. The kernel has no event for it that a stranger could wait for.
    agent::eventually(|| std::fs::metadata(&stat).is_err());
}

fn with_terminal(script: &str) -> Exec {
    Exec {
        terminal: Some(TerminalSize {
            rows: 33,
            columns: 101,
        }),
        ..shell(script)
    }
}

/// Reads until `text` has come, and returns all of it.
fn read_until(process: &lepton_agent::client::Process, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        let data = process.read(Output::Stdout).unwrap();
        assert!(!data.is_empty(), "ended after {seen:?}");
        seen.push_str(&String::from_utf8(data).unwrap());
    }
    seen
}

#[test]
fn a_terminal_has_a_size_that_changes() {
    let agent = Agent::start();
    let script = "stty size; trap 'stty size; exit 7' WINCH; echo ready; while :; do read x; done";
    let process = agent.client.exec(&with_terminal(script)).unwrap();
    assert!(read_until(&process, "ready").contains("33 101"));
    process
        .resize(TerminalSize {
            rows: 5,
            columns: 44,
        })
        .unwrap();
    // The shell runs the trap when the read comes back.
    assert!(process.write_stdin(b"\n").unwrap());
    read_until(&process, "5 44");
    assert_eq!(process.wait().unwrap(), ExitStatus::Exited(7));
}

#[test]
fn a_terminal_is_a_controlling_terminal() {
    let agent = Agent::start();
    let process = agent
        .client
        .exec(&with_terminal("tty; echo ready; exec sleep 1000"))
        .unwrap();
    assert!(read_until(&process, "ready").contains("/dev/pts/"));
    // Ctrl-C, as the byte it is.
    assert!(process.write_stdin(b"\x03").unwrap());
    assert_eq!(process.wait().unwrap(), ExitStatus::Killed(SIGINT));
}

#[test]
fn the_end_of_a_terminals_input_is_typed() {
    let agent = Agent::start();
    let process = agent.client.exec(&with_terminal("cat; exit 3")).unwrap();
    process.close_stdin().unwrap();
    assert_eq!(process.wait().unwrap(), ExitStatus::Exited(3));
}

#[test]
fn a_terminals_last_words_are_not_lost() {
    let agent = Agent::start();
    for _ in 0..20 {
        let (text, status) = output(&agent.client, &with_terminal("echo last words"));
        assert_eq!(text, "last words\r\n");
        assert_eq!(status, ExitStatus::Exited(0));
    }
}

#[test]
fn no_terminal_no_size() {
    let agent = Agent::start();
    let process = agent.client.exec(&exec(&["cat"])).unwrap();
    let size = TerminalSize {
        rows: 1,
        columns: 1,
    };
    assert!(matches!(process.resize(size), Err(CallError::Refused(_))));
}

#[test]
fn many_at_once() {
    let agent = Agent::start();
    let threads: Vec<_> = (0..50)
        .map(|i: u32| {
            let client = agent.client.clone();
            std::thread::spawn(move || {
                let script = format!("read line; echo {i} $line; exit {i}");
                let process = client.exec(&shell(&script)).unwrap();
                process.write_stdin(b"in\n").unwrap();
                assert_eq!(
                    drain(&process, Output::Stdout),
                    format!("{i} in\n").into_bytes()
                );
                assert_eq!(process.wait().unwrap().shell_status() as u32, i);
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn what_cannot_start_says_why() {
    let agent = Agent::start();
    let fails = |exec: Exec| match agent.client.exec(&exec) {
        Ok(_) => panic!("{exec:?} started"),
        Err(error) => error,
    };
    for missing in ["no-such-program", "/no/such/program"] {
        match fails(exec(&[missing])) {
            ExecError::NotFound(message) => assert!(message.contains(missing), "{message}"),
            error => panic!("{error}"),
        }
    }
    // A file without the permission, a directory, a name in a file.
    for denied in ["/etc/passwd", "/tmp"] {
        match fails(exec(&[denied])) {
            ExecError::NotExecutable(message) => assert!(message.contains(denied), "{message}"),
            error => panic!("{error}"),
        }
    }
    let elsewhere = Exec {
        working_directory: Some("/nowhere".into()),
        ..exec(&["true"])
    };
    let stranger = Exec {
        user: Some("no-such-user".into()),
        ..exec(&["true"])
    };
    let nameless = Exec {
        environment: vec![(OsString::new(), "value".into())],
        ..exec(&["true"])
    };
    for (exec, text) in [
        (elsewhere, "/nowhere"),
        (stranger, "no-such-user"),
        (nameless, "=value"),
        (exec(&[]), "no program"),
        (exec(&["tr\0ue"]), "nul"),
    ] {
        match fails(exec) {
            ExecError::NotExecutable(message) => assert!(message.contains(text), "{message}"),
            error => panic!("{error}"),
        }
    }
    // And the agent goes on.
    let (text, _) = output(&agent.client, &shell("echo fine"));
    assert_eq!(text, "fine\n");
}

#[test]
fn environment_and_directory() {
    let agent = Agent::start();
    let exec = Exec {
        environment: vec![
            ("A".into(), "b=c".into()),
            ("PATH".into(), "/bin:/usr/bin".into()),
        ],
        working_directory: Some("/usr".into()),
        ..exec(&["sh", "-c", "pwd; env"])
    };
    let (text, _) = output(&agent.client, &exec);
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("/usr"));
    let environment: BTreeMap<&str, &str> = lines.filter_map(|line| line.split_once('=')).collect();
    assert_eq!(environment.get("A"), Some(&"b=c"));
    assert_eq!(environment.get("PATH"), Some(&"/bin:/usr/bin"));
    assert_eq!(environment.get("HOME"), Some(&"/root"));
    // Nothing of the agent's own.
    assert_eq!(environment.get("CARGO_MANIFEST_DIR"), None);
}

#[test]
fn a_process_starts_with_no_signal_blocked() {
    let agent = Agent::start();
    for terminal in [None, with_terminal("").terminal] {
        let exec = Exec {
            terminal,
            ..exec(&["grep", "SigBlk", "/proc/self/status"])
        };
        let (text, _) = output(&agent.client, &exec);
        assert_eq!(text.trim(), "SigBlk:\t0000000000000000");
    }
}

#[test]
fn a_process_gets_none_of_the_agents_descriptors() {
    let agent = Agent::start();
    // Those that are not the agent's own but the test's: it would pass them on to any child.
    let inherited: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .collect();
    let process = agent
        .client
        .exec(&exec(&["ls", "-l", "/proc/self/fd"]))
        .unwrap();
    let text = String::from_utf8(drain(&process, Output::Stdout)).unwrap();
    let own = text
        .lines()
        .filter_map(|line| line.split_once(" -> "))
        .filter(|(_, target)| !inherited.contains(&PathBuf::from(target)))
        // The directory that ls itself reads.
        .filter(|(_, target)| !target.starts_with("/proc/"));
    let names: Vec<&str> = own
        .filter_map(|(name, _)| name.rsplit(' ').next())
        .collect();
    assert_eq!(names, ["0", "1", "2"], "{text}");
}

#[test]
fn another_user() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let agent = Agent::start();
    let other = Exec {
        user: Some("12345:23456".into()),
        ..shell("id -u; id -g; id -G")
    };
    let (text, _) = output(&agent.client, &other);
    assert_eq!(text, "12345\n23456\n23456\n");
    // The terminal is theirs to open again.
    let other = Exec {
        user: Some("12345".into()),
        ..with_terminal("echo mine >/dev/tty")
    };
    let (text, status) = output(&agent.client, &other);
    assert_eq!((text.as_str(), status), ("mine\r\n", ExitStatus::Exited(0)));
}

#[test]
fn a_connections_end_kills_its_processes_and_no_others() {
    let agent = Agent::start();
    let other = agent.connect();
    let stays = agent.client.exec(&exec(&["cat"])).unwrap();
    let goes = other.exec(&shell("echo $$; sleep 1000 & wait")).unwrap();
    let pid = String::from_utf8(goes.read(Output::Stdout).unwrap()).unwrap();
    let stat = format!("/proc/{}/stat", pid.trim());
    assert!(std::fs::metadata(&stat).is_ok());
    drop((goes, other));
    agent::eventually(|| std::fs::metadata(&stat).is_err());
    assert!(stays.signal(SIGTERM).unwrap());
    assert_eq!(stays.wait().unwrap(), ExitStatus::Killed(SIGTERM));
}

#[test]
fn the_agent_tells_of_itself() {
    let agent = Agent::start();
    let info = agent.client.info().unwrap();
    assert_eq!(info.agent_version, env!("CARGO_PKG_VERSION"));
    assert_eq!(agent.ready.version, info.agent_version);
    assert!(info.start_us <= info.ready_us && info.ready_us <= info.uptime_us);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(info.kernel_release, release.trim());
}

#[test]
fn a_shutdown_is_answered_and_done() {
    let mut agent = Agent::start();
    agent.client.shutdown().unwrap();
    assert!(agent.program.wait().unwrap().success());
}

#[test]
fn garbage_ends_its_connection_only() {
    use std::io::Write;
    let agent = Agent::start();
    let mut stream = agent.stream();
    // A header that promises more than the largest message, and then nothing.
    stream.write_all(&[0xff; 4096]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let (text, _) = output(&agent.client, &shell("echo fine"));
    assert_eq!(text, "fine\n");
}
