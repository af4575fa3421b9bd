//! `USER[:GROUP]`, looked up in the guest's own files. The C library's lookup would load shared
//! objects, which a static program has not.

/// Who a process runs as.
#[derive(Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub home: Option<String>,
}

/// Why there is no such identity.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    #[error("no user {0:?} in /etc/passwd")]
    NoUser(String),
    #[error("no group {0:?} in /etc/group")]
    NoGroup(String),
}

/// Resolves `spec` with the texts of `/etc/passwd` and `/etc/group`. A numeric user needs no entry;
/// its group is then 0 unless given.
pub fn resolve(spec: &str, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let (user, group_name) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let mut identity = match (find_user(user, passwd), user.parse()) {
        (Some(identity), _) => identity,
        (None, Ok(uid)) => Identity {
            uid,
            gid: 0,
            home: None,
        },
        (None, Err(_)) => return Err(UserError::NoUser(user.to_owned())),
    };
    if let Some(name) = group_name {
        identity.gid = name
            .parse()
            .ok()
            .or_else(|| find_group(name, group))
            .ok_or_else(|| UserError::NoGroup(name.to_owned()))?;
    }
    Ok(identity)
}

/// `name:password:uid:gid:comment:home:shell`, by name or by number.
fn find_user(user: &str, passwd: &str) -> Option<Identity> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else {
            return None;
        };
        if name != user && uid != user {
            return None;
        }
        Some(Identity {
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: Some(home.to_owned()),
        })
    })
}

/// `name:password:gid:members`.
fn find_group(group: &str, groups: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?;
        (name == group).then(|| gid.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34::/srv:/bin/false\n";
    const GROUP: &str = "root:x:0:\nbroken\nstaff:x:50:web\n";

    fn identity(uid: u32, gid: u32, home: Option<&str>) -> Result<Identity, UserError> {
        Ok(Identity {
            uid,
            gid,
            home: home.map(str::to_owned),
        })
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(
            resolve("web", PASSWD, GROUP),
            identity(33, 34, Some("/srv"))
        );
        assert_eq!(resolve("33", PASSWD, GROUP), identity(33, 34, Some("/srv")));
        assert_eq!(
            resolve("web:staff", PASSWD, GROUP),
            identity(33, 50, Some("/srv"))
        );
        assert_eq!(resolve("7:8", PASSWD, GROUP), identity(7, 8, None));
        assert_eq!(resolve("7", "", ""), identity(7, 0, None));
    }

    #[test]
    fn unknown_names_are_named() {
        assert_eq!(
            resolve("nobody", PASSWD, GROUP),
            Err(UserError::NoUser("nobody".into()))
        );
        assert_eq!(
            resolve("web:none", PASSWD, GROUP),
            Err(UserError::NoGroup("none".into()))
        );
        assert_eq!(
            resolve("broken", PASSWD, GROUP),
            Err(UserError::NoUser("broken".into()))
        );
    }
}
