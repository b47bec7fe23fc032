//! Repositories tied to each other: a fork borrows objects by alternates, so that none of a family may change alone.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::RootId;
use crate::path::RelPath;
use crate::seeded_bug;

/// A repository: its root and its folder there.
pub type Repository = (RootId, RelPath);

/// The repositories that are connected with any of `changed` by `ties`, those included.
pub fn closure(changed: &BTreeSet<Repository>, ties: &[(Repository, Repository)]) -> BTreeSet<Repository> {
    let mut neighbours: BTreeMap<&Repository, Vec<&Repository>> = BTreeMap::new();
    for (a, b) in ties {
        neighbours.entry(a).or_default().push(b);
        neighbours.entry(b).or_default().push(a);
    }
    let mut found = changed.clone();
    let mut left: Vec<&Repository> = changed.iter().collect();
    while let Some(next) = left.pop().filter(|_| !seeded_bug!(FamiliesAreTornApart)) {
        for &other in neighbours.get(next).into_iter().flatten() {
            if found.insert(other.clone()) {
                left.push(other);
            }
        }
    }
    found
}

/// The repositories that an `objects/info/alternates` names, as far as they are in a replicated root.
///
/// `roots` are the absolute paths of the roots, in the order of their numbers; relative lines are below `objects/` of
/// `repository`.
pub fn alternates(content: &[u8], repository: &Repository, roots: &[&[u8]]) -> Vec<Alternate> {
    let mut out = Vec::new();
    for line in content.split(|&b| b == b'\n').filter(|l| !l.is_empty() && !l.starts_with(b"#")) {
        let objects = if line.starts_with(b"/") {
            roots.iter().enumerate().find_map(|(n, root)| {
                let below = line.strip_prefix(*root)?.strip_prefix(b"/")?;
                Some((RootId(u8::try_from(n).ok()?), normal(&[], below)?))
            })
        } else {
            let own = [repository.1.as_bytes(), b"/objects"].concat();
            normal(&own, line).map(|path| (repository.0, path))
        };
        let found = objects.and_then(|(root, path)| {
            let repository = RelPath::new(path.strip_suffix(b"/objects")?).ok()?;
            Some((root, repository))
        });
        out.push(found.map_or(Alternate::Elsewhere, Alternate::Replicated));
    }
    out
}

/// Where an alternate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alternate {
    /// In a root.
    Replicated(Repository),
    /// Outside of every root, or not understood.
    Elsewhere,
}

/// Joins and resolves `.` and `..` by their letters; `None` above the root.
fn normal(base: &[u8], relative: &[u8]) -> Option<Vec<u8>> {
    let mut out: Vec<&[u8]> = base.split(|&b| b == b'/').filter(|c| !c.is_empty()).collect();
    for component in relative.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => drop(out.pop()?),
            name => out.push(name),
        }
    }
    Some(out.join(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(root: u8, path: &str) -> Repository {
        (RootId(root), RelPath::new(path.as_bytes()).unwrap())
    }

    #[test]
    fn a_family_is_all_that_is_tied() {
        let r = |p| repository(0, p);
        let ties = [(r("fork"), r("parent")), (r("fork of fork"), r("fork")), (r("other"), r("another"))];
        let found = closure(&[r("parent")].into(), &ties);
        assert_eq!(found, [r("parent"), r("fork"), r("fork of fork")].into());
        assert_eq!(closure(&[r("lone")].into(), &ties), [r("lone")].into());
    }

    #[test]
    fn alternates_are_found_in_every_root() {
        let roots: [&[u8]; 2] = [b"/srv/home", b"/srv/store"];
        let check = |content: &str, expected: &[Alternate]| {
            assert_eq!(alternates(content.as_bytes(), &repository(0, "repos/2"), &roots), expected, "{content:?}");
        };
        let there = |root, path| Alternate::Replicated(repository(root, path));
        check("/srv/home/repos/1/objects\n", &[there(0, "repos/1")]);
        check("../../1/objects", &[there(0, "repos/1")]);
        check("# a\n/srv/store/x/objects\n/elsewhere/objects\n", &[there(1, "x"), Alternate::Elsewhere]);
        check("/srv/homeless/objects\n../../../../objects\n", &[Alternate::Elsewhere, Alternate::Elsewhere]);
        check("", &[]);
    }
}
