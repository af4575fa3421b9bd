//! A database in a Linux guest, on a drive with an overlay, that is cloned while it writes.

use std::process::ExitCode;
use std::time::Instant;

use lepton_tests::carried;
use lepton_tests::heir::{Heir, clone};
use lepton_tests::linux::{self, Linux, drive};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{PATIENCE, test};
use serde_json::json;

fn main() -> ExitCode {
    suite::run(
        Order::OneByOne,
        &linux::NEEDS,
        [test!(a_database_is_cloned_while_it_writes)
            .needs(Need::Program("sqlite3"))
            .needs(Need::Program("ldd"))
            .needs(Need::Program("mkfs.ext4"))],
    )
}

/// The database's program, in the guest.
const SQLITE: &str = "/mnt/bin/sqlite3 -batch -bail";
const DATABASE: &str = "/mnt/db";
/// Accounts of the database, which move money between them, and what they have in all.
const ACCOUNTS: u32 = 100;
const MONEY: u32 = ACCOUNTS * 1000;

/// What is done with the database in a guest.
struct Database;

impl Database {
    /// Asks the database, while others write to it.
    #[track_caller]
    fn ask(guest: &Linux, question: &str) -> String {
        guest.sh(&format!(
            "{SQLITE} -cmd '.timeout 30000' {DATABASE} '{question}'"
        ))
    }

    /// Checks that a database is whole, as anybody sees it, and that the guest's kernel has nothing to complain of. Returns how
    /// many transactions it has.
    #[track_caller]
    fn check(guest: &Linux) -> u64 {
        let found = Self::ask(
            guest,
            "PRAGMA integrity_check; SELECT sum(money) FROM accounts; SELECT count(*) = max(number), count(*) FROM log",
        );
        let expected = format!("ok\n{MONEY}\n1|");
        let count = found.strip_prefix(&expected);
        let count = count.unwrap_or_else(|| panic!("{expected} was expected: {found}"));
        guest.sh("! dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|BUG:|WARNING:'");
        count.parse().expect("a number")
    }

    /// Waits until the writer has done more transactions, none of which failed.
    #[track_caller]
    fn wait_for_more(guest: &Linux) {
        let (before, deadline) = (Self::done(guest), Instant::now() + PATIENCE);
        while Self::done(guest) < before + 20 {
            assert!(Instant::now() < deadline, "the writer stands still");
        }
    }

    /// How many transactions the writer knows to be done. None failed.
    #[track_caller]
    fn done(guest: &Linux) -> u64 {
        let lines = guest.sh("cat /tmp/errors; wc -l < /tmp/done");
        let lines = lines.parse();
        lines.unwrap_or_else(|_| panic!("the writer: {}", guest.sh("cat /tmp/errors")))
    }
}

fn a_database_is_cloned_while_it_writes() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    // With room for a database.
    let tree = folder.path().join("tree");
    carried::carry(&tree, &["sqlite3"]);
    let image = carried::image(&tree);
    let mut guest = Linux::boot("quiet", |_, config| {
        config["machine-config"]["clonable"] = true.into();
        let mut data = drive("data", &image, "Async", false);
        data["cache_type"] = "Writeback".into();
        data["overlay"] = json!({ "path": folder.path().join("own") });
        config["drives"].as_array_mut().expect("a list").push(data);
    });
    carried::mount(&guest, "rw");
    guest.sh("dmesg -c >/dev/null");
    let begin = format!(
        "PRAGMA journal_mode = WAL; CREATE TABLE log (number INTEGER PRIMARY KEY, text);
         CREATE TABLE accounts (id INTEGER PRIMARY KEY, money);
         WITH RECURSIVE ids (id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM ids WHERE id < {ACCOUNTS} - 1)
         INSERT INTO accounts SELECT id, 1000 FROM ids; CREATE INDEX moneys ON accounts (money);"
    );
    assert_eq!(Database::ask(&guest, &begin), "wal");
    // Not of the agent's session, which ends in a copy: the copies' writers go on, too.
    let writer = format!(
        "n=0
         while n=$((n + 1)); do echo \"BEGIN IMMEDIATE;
             UPDATE accounts SET money = money - 1 WHERE id = $n % {ACCOUNTS};
             UPDATE accounts SET money = money + 1 WHERE id = $n * 7 % {ACCOUNTS};
             INSERT INTO log VALUES ($n, hex(randomblob(100))); COMMIT; SELECT $n;\"
         done | {SQLITE} -cmd '.timeout 30000' -cmd 'PRAGMA synchronous = FULL' {DATABASE} >/tmp/done 2>/tmp/errors
         echo \"it ended: $?\" >>/tmp/errors"
    );
    guest.run("cat >/tmp/writer", writer.as_bytes());
    guest.sh("touch /tmp/done /tmp/errors; setsid sh /tmp/writer </dev/null >/dev/null 2>&1 &");
    Database::wait_for_more(&guest);
    for number in 0..20 {
        let heir = Heir::new();
        let before = Database::done(&guest);
        clone(&mut guest.api, &[heir.child()]);
        // It has seen no error, and goes on.
        Database::wait_for_more(&guest);
        // The copy has the processors for itself then.
        guest.api.reach("Paused");
        let copy = heir.linux();
        let done = Database::check(&copy);
        assert!(done >= before, "{done} transactions of {before}");
        if number % 10 == 0 {
            // Its writer goes on, and all that it has written is there once more after it was killed.
            Database::wait_for_more(&copy);
            copy.sh("killall -9 sqlite3; while killall -0 sqlite3 2>/dev/null; do :; done");
            assert!(Database::check(&copy) > done);
            copy.sh(&format!("umount {}", carried::PLACE));
        }
        // Whoever is killed, the machine goes on.
        drop(copy);
        guest.api.reach("Resumed");
    }
    let before = Database::done(&guest);
    Database::wait_for_more(&guest);
    assert!(Database::check(&guest) >= before + 20);
}
