use std::os::unix::fs::{MetadataExt, symlink};

use super::*;

fn name(text: &str) -> &OsStr {
    OsStr::new(text)
}

fn opened() -> (tempfile::TempDir, Folder) {
    let directory = tempfile::tempdir().unwrap();
    let folder = Folder::open(directory.path()).unwrap();
    (directory, folder)
}

#[test]
fn what_was_made_goes_and_what_was_there_stays() {
    let (directory, folder) = opened();
    std::fs::create_dir(directory.path().join("old")).unwrap();
    let mut made = Made::default();
    let old = folder.enter_or_make(name("old"), 0o755, &mut made).unwrap();
    let new = old.enter_or_make(name("new"), 0o755, &mut made).unwrap();
    drop(new.create(name("file"), 0o644, &mut made).unwrap());
    assert!(directory.path().join("old/new/file").exists());
    drop(made);
    assert!(directory.path().join("old").exists());
    assert!(!directory.path().join("old/new").exists());
}

#[test]
fn what_was_claimed_goes_too() {
    let (directory, folder) = opened();
    std::fs::create_dir(directory.path().join("old")).unwrap();
    for name in ["old", "new"] {
        let mut made = Made::default();
        folder.claim(OsStr::new(name), 0o755, &mut made).unwrap();
        drop(made);
        assert!(!directory.path().join(name).exists(), "{name}");
    }
}

#[test]
fn what_is_kept_stays() {
    let (directory, folder) = opened();
    let mut made = Made::default();
    folder.enter_or_make(name("new"), 0o755, &mut made).unwrap();
    made.keep();
    assert!(directory.path().join("new").exists());
}

#[test]
fn no_link_is_followed() {
    let (directory, folder) = opened();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("file"), "untouched").unwrap();
    symlink(outside.path(), directory.path().join("folder")).unwrap();
    symlink(outside.path().join("file"), directory.path().join("file")).unwrap();
    let mut made = Made::default();
    let is_refused = |result: Option<FolderError>| matches!(result, Some(FolderError::Symlink(_)));
    assert!(is_refused(folder.enter(name("folder")).err()));
    assert!(is_refused(
        folder.enter_or_make(name("folder"), 0o755, &mut made).err()
    ));
    assert!(is_refused(folder.read(name("file")).err()));
    assert!(is_refused(folder.write(name("file"), "changed").err()));
    let refused = folder.create(name("file"), 0o644, &mut made).err();
    assert!(
        matches!(refused, Some(FolderError::Exists(_))),
        "{refused:?}"
    );
    assert!(is_refused(
        folder.replace(name("file"), 0o644, &mut made).err()
    ));
    let text = std::fs::read_to_string(outside.path().join("file")).unwrap();
    assert_eq!(text, "untouched");
    assert!(made.is_empty());
}

#[test]
fn nothing_leads_out() {
    let (directory, folder) = opened();
    std::fs::create_dir(directory.path().join("in")).unwrap();
    let inner = folder.enter(name("in")).unwrap();
    for bad in ["..", "../in", "/", "/etc"] {
        assert!(inner.enter(name(bad)).is_err(), "{bad}");
    }
}

#[test]
fn a_file_of_two_names_is_not_replaced() {
    let (directory, folder) = opened();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("file"), "old").unwrap();
    std::fs::hard_link(path("file"), path("other")).unwrap();
    let refused = folder
        .replace(name("file"), 0o644, &mut Made::default())
        .err();
    assert!(
        matches!(refused, Some(FolderError::HardLink(_))),
        "{refused:?}"
    );
    std::fs::remove_file(path("other")).unwrap();
    let mut made = Made::default();
    let mut file = folder.replace(name("file"), 0o644, &mut made).unwrap();
    file.write_all(b"new").unwrap();
    made.keep();
    assert_eq!(std::fs::read_to_string(path("file")).unwrap(), "new");
}

#[test]
fn a_file_put_in_the_place_of_the_program_is_not_run() {
    let (directory, folder) = opened();
    let path = directory.path().join("program");
    let mut made = Made::default();
    let file = folder.create(name("program"), 0o755, &mut made).unwrap();
    folder.runnable(name("program"), &file).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "another").unwrap();
    let refused = folder.runnable(name("program"), &file).err();
    assert!(
        matches!(refused, Some(FolderError::Changed(_))),
        "{refused:?}"
    );
}

#[test]
fn a_folder_is_given_away_alone() {
    let (directory, folder) = opened();
    let meta = std::fs::metadata(directory.path()).unwrap();
    let owner = Owner {
        uid: Uid::from_raw(meta.uid()),
        gid: Gid::from_raw(meta.gid()),
    };
    std::fs::create_dir(directory.path().join("in")).unwrap();
    folder.enter(name("in")).unwrap().give_to(owner).unwrap();
    let meta = std::fs::metadata(directory.path().join("in")).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o700);
}

#[test]
fn only_a_socket_of_one_name_is_given_away() {
    let (directory, folder) = opened();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("file"), "untouched").unwrap();
    let own = rustix::process::geteuid();
    let owner = match own.is_root() {
        true => Uid::from_raw(61_234),
        false => own,
    };
    let owner = Owner {
        uid: owner,
        gid: rustix::process::getegid(),
    };
    let place = directory.path().join("socket");
    let refused = || folder.give_socket(name("socket"), owner).unwrap_err();
    std::fs::hard_link(outside.path().join("file"), &place).unwrap();
    assert!(matches!(refused(), FolderError::Changed(_)));
    std::fs::remove_file(&place).unwrap();
    symlink(outside.path().join("file"), &place).unwrap();
    assert!(matches!(refused(), FolderError::Symlink(_)));
    std::fs::remove_file(&place).unwrap();
    // By the way that the jailer makes it.
    let _socket = std::os::unix::net::UnixListener::bind(folder.place(name("socket"))).unwrap();
    std::fs::hard_link(&place, outside.path().join("socket")).unwrap();
    assert!(matches!(refused(), FolderError::Changed(_)));
    std::fs::remove_file(outside.path().join("socket")).unwrap();
    folder.give_socket(name("socket"), owner).unwrap();
    assert_eq!(std::fs::metadata(&place).unwrap().uid(), owner.uid.as_raw());
    let file = std::fs::metadata(outside.path().join("file")).unwrap();
    assert_eq!(file.uid(), own.as_raw());
}

#[test]
fn a_file_without_a_name_gets_one() {
    let (directory, folder) = opened();
    let path = directory.path().join("program");
    let (mut file, runnable) = folder.nameless(0o755).unwrap();
    file.write_all(b"new").unwrap();
    drop(file);
    assert!(!path.exists());
    // In the place of an old one, and not of anything else.
    std::fs::write(&path, "old").unwrap();
    std::fs::create_dir(directory.path().join("folder")).unwrap();
    let mut made = Made::default();
    let refused = folder.link(name("folder"), runnable.as_fd(), &mut made);
    assert!(matches!(refused, Err(FolderError::Exists(_))));
    let linked = folder.link(name("program"), runnable.as_fd(), &mut made);
    linked.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    drop(made);
    assert!(!path.exists());
}
