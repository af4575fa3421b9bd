//! Control groups: `<hierarchy>/<parent>/<id>`, of version 1 (one hierarchy for each controller) or 2.

mod mounts;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::folder::{Folder, FolderError, Made};
use mounts::Mount;

const MODE: u32 = 0o755;
/// statfs(2): a hierarchy of version 1, and one of version 2.
const CGROUP_SUPER_MAGIC: i64 = 0x27_e0eb;
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// Of the kernel's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy for each controller.
    V1,
    /// One hierarchy.
    V2,
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "1" => Ok(Self::V1),
            "2" => Ok(Self::V2),
            _ => Err("it is 1 or 2".into()),
        }
    }
}

impl Version {
    /// The file by which a process joins a group.
    fn members(self) -> &'static OsStr {
        OsStr::new(match self {
            Self::V1 => "tasks",
            Self::V2 => "cgroup.procs",
        })
    }
}

/// One `--cgroup`: a file of the group and what is written to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    file: String,
    value: String,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "type CONTROLLER.FILE=VALUE, such as cpu.shares=10";
        let (file, value) = text.split_once('=').ok_or(FORM)?;
        if value.is_empty() {
            return Err(FORM.into());
        }
        let (controller, rest) = file.split_once('.').ok_or(FORM)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if controller.is_empty() || rest.is_empty() || !file.chars().all(plain) {
            return Err(FORM.into());
        }
        Ok(Self {
            file: file.to_owned(),
            value: value.to_owned(),
        })
    }
}

impl Setting {
    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// The group in which the machine's is made: a path below the hierarchy's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent(PathBuf);

impl FromStr for Parent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        if path
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            return Ok(Self(path));
        }
        Err(
            "a group is given from the hierarchy's root on, without / in front and without . or .."
                .into(),
        )
    }
}

impl Parent {
    /// The group that has a program's name.
    pub fn of_program(name: &OsStr) -> Self {
        Self(PathBuf::from(name))
    }

    fn names(&self) -> impl Iterator<Item = &OsStr> {
        self.0.iter()
    }
}

/// Why the groups cannot be made or joined.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// /proc/self/mounts cannot be read.
    #[error("/proc/self/mounts: {0}")]
    Mounts(#[source] io::Error),
    /// There is none of the version asked for.
    #[error("--cgroup-version {0}: no such hierarchy is mounted")]
    NoHierarchy(u8),
    /// No mounted hierarchy of the version asked for has it.
    #[error("--cgroup {setting}: there is no controller {controller} of cgroup version {version}")]
    NoController {
        /// As asked for.
        setting: String,
        /// Its controller.
        controller: String,
        /// 1 or 2.
        version: u8,
    },
    /// What /proc/self/mounts calls a hierarchy is something else.
    #[error("{}: not a cgroup hierarchy", .0.display())]
    NotAHierarchy(PathBuf),
    /// A file of a group cannot be written or read.
    #[error("--cgroup {setting}: {source}")]
    Setting {
        /// As asked for.
        setting: String,
        /// Why not.
        source: FolderError,
    },
    /// A group cannot be opened or made.
    #[error("cgroup: {0}")]
    Folder(#[from] FolderError),
    /// A process cannot be put there.
    #[error(
        "cannot move the VMM to the cgroup {}: {source}; to make a group below it, give a --cgroup",
        path.display()
    )]
    Join {
        /// The group.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Of which version.
    pub version: Version,
    /// In which group.
    pub parent: Parent,
    /// The values.
    pub settings: Vec<Setting>,
}

/// A hierarchy, open, and what is to be set in it.
struct Hierarchy {
    root: Folder,
    version: Version,
    settings: Vec<Setting>,
}

/// Everything about groups that can be known before anything is made.
pub struct Plan {
    parent: Parent,
    make: Vec<Hierarchy>,
    join: Option<Group>,
}

/// A group to be joined.
pub struct Group {
    path: PathBuf,
    members: File,
}

impl Group {
    fn open(folder: &Folder, version: Version) -> Result<Self, CgroupError> {
        Ok(Self {
            path: folder.path().to_owned(),
            members: folder.writable(version.members())?,
        })
    }

    /// Puts this process into the group.
    pub fn join(&self) -> Result<(), CgroupError> {
        // 0 is whoever writes, whatever its id in whichever namespace.
        (&self.members)
            .write_all(b"0\n")
            .map_err(|source| CgroupError::Join {
                path: self.path.clone(),
                source,
            })
    }
}

impl Plan {
    /// Finds the hierarchies that `wanted` needs.
    ///
    /// Nothing set in version 2 means: no group is made, and the parent is joined if it exists.
    pub fn open(wanted: Wanted) -> Result<Self, CgroupError> {
        let Wanted {
            version,
            parent,
            settings,
        } = wanted;
        let mut plan = Self {
            parent,
            make: Vec::new(),
            join: None,
        };
        if settings.is_empty() && version == Version::V1 {
            return Ok(plan);
        }
        let text = std::fs::read_to_string("/proc/self/mounts").map_err(CgroupError::Mounts)?;
        let mounts: Vec<Mount> = mounts::parse(&text)
            .into_iter()
            .filter(|mount| mount.version == version)
            .collect();
        match version {
            Version::V1 => plan.find_controllers(&mounts, settings)?,
            Version::V2 => plan.find_unified(&mounts, settings)?,
        }
        Ok(plan)
    }

    fn find_controllers(
        &mut self,
        mounts: &[Mount],
        settings: Vec<Setting>,
    ) -> Result<(), CgroupError> {
        if mounts.is_empty() {
            return Err(CgroupError::NoHierarchy(1));
        }
        for setting in settings {
            let mount = mounts
                .iter()
                .find(|mount| mount.has_controller(setting.controller()))
                .ok_or_else(|| no_controller(&setting, 1))?;
            // One hierarchy can have several controllers.
            match self.make.iter_mut().find(|h| h.root.path() == mount.path) {
                Some(hierarchy) => hierarchy.settings.push(setting),
                None => self.make.push(Hierarchy {
                    root: open_hierarchy(mount)?,
                    version: Version::V1,
                    settings: vec![setting],
                }),
            }
        }
        Ok(())
    }

    fn find_unified(
        &mut self,
        mounts: &[Mount],
        settings: Vec<Setting>,
    ) -> Result<(), CgroupError> {
        let mount = mounts.first().ok_or(CgroupError::NoHierarchy(2))?;
        let root = open_hierarchy(mount)?;
        if settings.is_empty() {
            let parent = self
                .parent
                .names()
                .try_fold(root, |folder, name| folder.enter(name));
            self.join = match parent {
                Ok(folder) => Some(Group::open(&folder, Version::V2)?),
                Err(FolderError::Call { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    None
                }
                Err(error) => return Err(error.into()),
            };
            return Ok(());
        }
        let controllers = root.read(OsStr::new("cgroup.controllers"))?;
        let has = |name: &str| controllers.split_whitespace().any(|found| found == name);
        if let Some(setting) = settings.iter().find(|s| !has(s.controller())) {
            return Err(no_controller(setting, 2));
        }
        self.make.push(Hierarchy {
            root,
            version: Version::V2,
            settings,
        });
        Ok(())
    }

    /// Makes the group `id` in each hierarchy, with the values asked for. What is to be joined comes back.
    ///
    /// `own` gets the machine's own groups; `shared` those above, which others may use.
    pub fn make(
        self,
        id: &str,
        own: &mut Made,
        shared: &mut Made,
    ) -> Result<Vec<Group>, CgroupError> {
        let mut groups: Vec<Group> = self.join.into_iter().collect();
        for hierarchy in self.make {
            let mut above = vec![hierarchy.root.clone()];
            let mut folder = hierarchy.root.clone();
            for name in self.parent.names() {
                folder = folder.enter_or_make(name, MODE, shared)?;
                above.push(folder.clone());
            }
            let group = folder.claim(OsStr::new(id), MODE, own)?;
            match hierarchy.version {
                Version::V1 => inherit(&above, &group, &hierarchy.settings)?,
                Version::V2 => enable(&above, &hierarchy.settings)?,
            }
            for setting in &hierarchy.settings {
                group
                    .write(OsStr::new(&setting.file), &format!("{}\n", setting.value))
                    .map_err(|source| in_setting(setting, source))?;
            }
            groups.push(Group::open(&group, hierarchy.version)?);
        }
        Ok(groups)
    }
}

fn text(setting: &Setting) -> String {
    format!("{}={}", setting.file, setting.value)
}

fn in_setting(setting: &Setting, source: FolderError) -> CgroupError {
    CgroupError::Setting {
        setting: text(setting),
        source,
    }
}

fn no_controller(setting: &Setting, version: u8) -> CgroupError {
    CgroupError::NoController {
        setting: text(setting),
        controller: setting.controller().to_owned(),
        version,
    }
}

fn open_hierarchy(mount: &Mount) -> Result<Folder, CgroupError> {
    let root = Folder::open(Path::new(&mount.path))?;
    let magic = match mount.version {
        Version::V1 => CGROUP_SUPER_MAGIC,
        Version::V2 => CGROUP2_SUPER_MAGIC,
    };
    if root.file_system()? != magic {
        return Err(CgroupError::NotAHierarchy(mount.path.clone()));
    }
    Ok(root)
}

/// Version 1: a file that is empty in a new group and must not be gets what the group above has, from the root down.
fn inherit(above: &[Folder], group: &Folder, settings: &[Setting]) -> Result<(), CgroupError> {
    // Without both of these nobody can join a group of cpuset.
    const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];
    let is_cpuset = settings.iter().any(|s| s.controller() == "cpuset");
    for file in CPUSET.iter().filter(|_| is_cpuset) {
        let file = OsStr::new(file);
        let chain: Vec<&Folder> = above.iter().chain([group]).collect();
        for pair in chain.windows(2) {
            if let [upper, lower] = pair
                && lower.read(file)?.trim().is_empty()
            {
                let value = upper.read(file)?;
                // Another jailer may have been faster with a group that both use.
                let written = lower.write(file, &value);
                if lower.read(file)?.trim().is_empty() {
                    written?;
                }
            }
        }
    }
    Ok(())
}

/// Version 2: a controller works in a group only if every group above passes it on.
fn enable(above: &[Folder], settings: &[Setting]) -> Result<(), CgroupError> {
    let file = OsStr::new("cgroup.subtree_control");
    for setting in settings {
        let name = setting.controller();
        for folder in above {
            let enabled = folder.read(file)?;
            if !enabled.split_whitespace().any(|found| found == name) {
                folder
                    .write(file, &format!("+{name}\n"))
                    .map_err(|source| in_setting(setting, source))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
