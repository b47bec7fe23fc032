//! What a home holds, read from a tree: repositories with their references and objects, plain files.
//!
//! Invariants: a loose reference shadows a packed one; an object is there only when it is whole.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::objects::{Object, ObjectName, hex, unhex, unpack};
use crate::model::Seen;

/// A tree, by path below the root.
pub(super) type Files = BTreeMap<Vec<u8>, Seen>;

/// The folder of all repositories, below the root.
pub(super) const REPOSITORIES: &str = "shared/data/repositories";

/// References by full name, of both namespaces.
pub(super) type References = BTreeMap<String, ObjectName>;

/// The folders of loose references, and the files of packed ones.
pub(super) const NAMESPACES: [(&str, &str); 2] = [("refs", "packed-refs"), ("stash-refs", "stash-packed-refs")];

/// The names of repositories.
pub(super) fn repositories(files: &Files) -> BTreeSet<String> {
    let within = format!("{REPOSITORIES}/");
    let below = files.range(within.clone().into_bytes()..).map_while(|(path, _)| path.strip_prefix(within.as_bytes()));
    let names = below.filter(|p| !p.contains(&b'/')).map(|p| String::from_utf8_lossy(p).into_owned());
    // What git takes for one: a folder that becomes a repository, or is no longer one, is none.
    names
        .filter(|name| ["HEAD", "objects", "refs"].iter().all(|part| files.contains_key(format!("{within}{name}/{part}").as_bytes())))
        .collect()
}

/// All that is below a folder, by path below it.
pub(super) fn below<'a>(files: &'a Files, dir: &str) -> impl Iterator<Item = (&'a [u8], &'a Seen)> {
    let prefix = format!("{dir}/").into_bytes();
    files.range(prefix.clone()..).map_while(move |(path, seen)| Some((path.strip_prefix(prefix.as_slice())?, seen)))
}

fn is_file(seen: &Seen) -> bool {
    seen.stat.kind == coldspare_os::FileKind::File
}

/// The references of one repository.
///
/// # Errors
/// In words: a reference that is none.
pub(super) fn references(files: &Files, repository: &str) -> Result<References, String> {
    let mut out = References::new();
    let text = |seen: &Seen| String::from_utf8_lossy(&seen.content).into_owned();
    for (dir, packed) in NAMESPACES {
        if let Some(seen) = files.get(format!("{REPOSITORIES}/{repository}/{packed}").as_bytes()) {
            for line in text(seen).lines().filter(|l| !l.starts_with('#')) {
                let (value, name) = line.split_once(' ').ok_or_else(|| format!("{repository}/{packed} says {line:?}"))?;
                out.insert(name.into(), unhex(value).ok_or_else(|| format!("{repository}/{packed} says {line:?}"))?);
            }
        }
        for (path, seen) in below(files, &format!("{REPOSITORIES}/{repository}/{dir}")).filter(|(_, s)| is_file(s)) {
            let name = format!("{dir}/{}", String::from_utf8_lossy(path));
            if name.ends_with(".lock") {
                continue;
            }
            let value = unhex(text(seen).trim_end()).ok_or_else(|| format!("{repository}/{name} holds {:?}", text(seen)))?;
            out.insert(name, value);
        }
    }
    Ok(out)
}

/// Objects that were read before, so that each is taken apart once.
#[derive(Debug, Default)]
pub(super) struct Library {
    loose: HashMap<Vec<u8>, Option<Object>>,
    #[allow(clippy::type_complexity)] // a pack and its index, to what they hold
    packs: HashMap<(Vec<u8>, Vec<u8>), Option<BTreeMap<ObjectName, Object>>>,
}

impl Library {
    fn loose(&mut self, file: &[u8]) -> Option<Object> {
        if let Some(known) = self.loose.get(file) {
            return known.clone();
        }
        let object = Object::of_loose(file);
        self.loose.insert(file.to_vec(), object.clone());
        object
    }

    /// All objects of a repository, without those that it borrows. What is damaged is left out.
    pub(super) fn own(&mut self, files: &Files, repository: &str) -> BTreeMap<ObjectName, Object> {
        let mut out = BTreeMap::new();
        let objects = format!("{REPOSITORIES}/{repository}/objects");
        for (path, seen) in below(files, &objects).filter(|(_, s)| is_file(s)) {
            let path = String::from_utf8_lossy(path);
            if let Some(pack) = path.strip_prefix("pack/").and_then(|name| name.strip_suffix(".idx")) {
                let Some(content) = files.get(format!("{objects}/pack/{pack}.pack").as_bytes()) else { continue };
                let key = (content.content.clone(), seen.content.clone());
                let unpacked = self.packs.entry(key).or_insert_with_key(|(pack, index)| unpack(pack, index));
                out.extend(unpacked.iter().flatten().map(|(name, object)| (*name, object.clone())));
            } else if let Some(name) = path.split_once('/').and_then(|(dir, rest)| unhex(&format!("{dir}{rest}")))
                && let Some(object) = self.loose(&seen.content)
                && object.name() == name
            {
                out.insert(name, object);
            }
        }
        out
    }

    /// All objects of a repository, with those of the one that it borrows from.
    pub(super) fn all(&mut self, files: &Files, repository: &str) -> BTreeMap<ObjectName, Object> {
        let mut out = self.own(files, repository);
        if let Some(base) = base_of(files, repository) {
            out.extend(self.own(files, &base));
        }
        out
    }

    /// Whether every object that the references need is there.
    ///
    /// # Errors
    /// In words: what is missing.
    pub(super) fn closed(&mut self, files: &Files, repository: &str, references: &References) -> Result<(), String> {
        let objects = self.all(files, repository);
        let mut seen = BTreeSet::new();
        for (reference, value) in references {
            let mut left = vec![*value];
            while let Some(name) = left.pop() {
                if !seen.insert(name) {
                    continue;
                }
                let object = objects.get(&name);
                let object =
                    object.ok_or_else(|| format!("{repository}: {reference} needs {}, which is missing or damaged", hex(&name)))?;
                left.extend(object.needs());
            }
        }
        Ok(())
    }
}

/// The repository that this one borrows objects from.
pub(super) fn base_of(files: &Files, repository: &str) -> Option<String> {
    let seen = files.get(format!("{REPOSITORIES}/{repository}/objects/info/alternates").as_bytes())?;
    let text = String::from_utf8_lossy(&seen.content).into_owned();
    Some(text.trim_end().strip_suffix("/objects")?.rsplit('/').next()?.into())
}

/// All that these references lead to.
pub(super) fn reachable(objects: &BTreeMap<ObjectName, Object>, references: impl Iterator<Item = ObjectName>) -> BTreeSet<ObjectName> {
    let mut out = BTreeSet::new();
    let mut left: Vec<_> = references.collect();
    while let Some(name) = left.pop() {
        if out.insert(name) {
            left.extend(objects.get(&name).map(Object::needs).unwrap_or_default());
        }
    }
    out
}

/// Whether git never means a path to last.
pub(super) fn is_transient(path: &[u8]) -> bool {
    let inside = |component: &[u8]| component.starts_with(b"tmp_");
    path.ends_with(b".lock") || path.ends_with(b"packed-refs.new") || path.split(|&b| b == b'/').any(inside)
}
