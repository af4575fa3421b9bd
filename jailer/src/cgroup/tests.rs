use super::*;

#[test]
fn a_setting_is_a_file_and_a_value() {
    let setting: Setting = "cpu.shares=10".parse().unwrap();
    assert_eq!(
        (setting.controller(), text(&setting).as_str()),
        ("cpu", "cpu.shares=10")
    );
    let setting: Setting = "io.max=8:0 rbps=1048576".parse().unwrap();
    assert_eq!(setting.value, "8:0 rbps=1048576");
    let setting: Setting = "hugetlb.2MB.limit_in_bytes=0".parse().unwrap();
    assert_eq!(setting.controller(), "hugetlb");
}

#[test]
fn what_is_no_setting_is_refused() {
    for bad in [
        "",
        "=",
        "cpu.shares",
        "cpu.shares=",
        "=10",
        "shares=10",
        ".shares=10",
        "cpu.=10",
        "../cpu.shares=10",
        "/cpu.shares=10",
        "a/cpu.shares=10",
        "cpu.sha res=1",
    ] {
        let error = bad.parse::<Setting>().unwrap_err();
        assert!(error.contains("cpu.shares=10"), "{bad}: {error}");
    }
}

#[test]
fn a_parent_lies_below_the_root() {
    let parent: Parent = "all_uvms/external-1".parse().unwrap();
    assert_eq!(parent.names().count(), 2);
    for bad in ["/all", "..", "all/../other", "./all"] {
        assert!(bad.parse::<Parent>().is_err(), "{bad}");
    }
}

#[test]
fn there_are_two_versions() {
    assert_eq!("1".parse(), Ok(Version::V1));
    assert_eq!("2".parse(), Ok(Version::V2));
    for bad in ["", "0", "3", "v2"] {
        assert!(bad.parse::<Version>().is_err(), "{bad}");
    }
}

#[test]
fn an_empty_file_gets_what_the_group_above_has() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("parent/id");
    std::fs::create_dir_all(&path).unwrap();
    let write = |folder: &Path, cpus: &str, mems: &str| {
        std::fs::write(folder.join("cpuset.cpus"), cpus).unwrap();
        std::fs::write(folder.join("cpuset.mems"), mems).unwrap();
    };
    write(base.path(), "0-1\n", "0\n");
    write(&base.path().join("parent"), "\n", "0\n");
    write(&path, "", "");
    let folders = [base.path().to_owned(), base.path().join("parent"), path];
    let [root, parent, group] = folders.map(|path| Folder::open(&path).unwrap());
    let settings = ["cpuset.cpus=1".parse().unwrap()];
    inherit(&[root, parent.clone()], &group, &settings).unwrap();
    for folder in [&parent, &group] {
        assert_eq!(folder.read(OsStr::new("cpuset.cpus")).unwrap(), "0-1\n");
        assert_eq!(folder.read(OsStr::new("cpuset.mems")).unwrap(), "0\n");
    }
}

#[test]
fn a_folder_that_is_no_hierarchy_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let line = format!("cgroup {} cgroup rw,cpu 0 0\n", folder.path().display());
    let mounts = mounts::parse(&line);
    let error = open_hierarchy(&mounts[0]).unwrap_err();
    assert!(matches!(error, CgroupError::NotAHierarchy(_)), "{error}");
}
