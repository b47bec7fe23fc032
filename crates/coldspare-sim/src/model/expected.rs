//! The tree that a changeset is to leave, told by the one who made the changeset, and the comparison with a disk.
//!
//! It shares no code with the standby.

use std::collections::BTreeMap;

use coldspare_core::{Body as EntryBody, Entry, Meta};

use super::disk::ModelDisk;
use super::image::{Body, Node, ROOT};

/// Entries by path below the root; the root itself is the empty path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected(BTreeMap<Vec<u8>, Holds>);

/// What one path holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holds {
    /// As the active would send it.
    pub entry: Entry,
    /// Of a file.
    pub content: Vec<u8>,
}

impl Expected {
    /// Puts an entry, over whatever was there.
    pub fn put(&mut self, path: &[u8], holds: Holds) {
        if !holds.entry.is_dir() {
            self.remove(path);
        }
        self.0.insert(path.to_vec(), holds);
    }

    /// Removes a path and all below it.
    pub fn remove(&mut self, path: &[u8]) {
        self.0.retain(|p, _| !is_within(p, path));
    }

    /// Puts a folder and all below it at another path.
    pub fn rename(&mut self, from: &[u8], to: &[u8]) {
        for path in self.0.keys().filter(|p| is_within(p, from)).cloned().collect::<Vec<_>>() {
            let holds = self.0.remove(&path).expect("listed");
            self.0.insert([to, &path[from.len()..]].concat(), holds);
        }
    }

    /// Takes a path and all below it from `other`.
    pub fn keep(&mut self, path: &[u8], other: &Expected) {
        let kept = other.0.iter().filter(|(p, _)| is_within(p, path));
        self.0.extend(kept.map(|(p, holds)| (p.clone(), holds.clone())));
    }

    /// Whether there is an entry.
    pub fn holds(&self, path: &[u8]) -> Option<&Holds> {
        self.0.get(path)
    }

    /// All entries, those above before those below.
    pub fn all(&self) -> impl Iterator<Item = (&[u8], &Holds)> {
        self.0.iter().map(|(path, holds)| (path.as_slice(), holds))
    }

    /// What the tree at `root` has otherwise; `.coldspare` is no part of it.
    pub fn difference(&self, disk: &ModelDisk, root: &[u8]) -> Option<String> {
        let state = disk.state();
        let image = &state.live;
        let Ok(top) = state.walk(ROOT, root) else { return Some("the root is gone".into()) };
        let mut seen = BTreeMap::new();
        let mut names = BTreeMap::<u64, usize>::new();
        let mut rest = vec![(Vec::new(), top)];
        while let Some((path, id)) = rest.pop() {
            let node = image.known(id);
            match self.0.get(&path) {
                // Before the first changeset the root is whatever it was.
                None if path.is_empty() && self.0.is_empty() => {}
                None => return Some(format!("{} should not be there", path.escape_ascii())),
                Some(holds) => {
                    if let Some(difference) = self.of(holds, node) {
                        return Some(format!("{}: {difference}", path.escape_ascii()));
                    }
                }
            }
            *names.entry(node.ino).or_default() += 1;
            if let Body::Dir(dir) = &node.body {
                for (name, id) in &dir.entries {
                    match path.as_slice() {
                        b"" if name.as_ref() == b".coldspare" => {}
                        b"" => rest.push((name.to_vec(), *id)),
                        _ => rest.push(([&path, b"/".as_slice(), name].concat(), *id)),
                    }
                }
            }
            seen.insert(path, node.ino);
        }
        if let Some(path) = self.0.keys().find(|path| !seen.contains_key(*path)) {
            return Some(format!("{} is missing", path.escape_ascii()));
        }
        // One file has several names here exactly when it should.
        let mut expected: BTreeMap<&[u8], usize> = self.0.keys().map(|path| (path.as_slice(), 1)).collect();
        for (path, holds) in &self.0 {
            if let EntryBody::Hardlink { to } = &holds.entry.body {
                *expected.get_mut(to.as_bytes())? += 1;
                if seen[path] != seen[to.as_bytes()] {
                    return Some(format!("{} is no name of {to}", path.escape_ascii()));
                }
                expected.remove(path.as_slice());
            }
        }
        let wrong = expected.into_iter().find(|(path, count)| names[&seen[*path]] != *count);
        wrong.map(|(path, count)| format!("{} has {} names instead of {count}", path.escape_ascii(), names[&seen[path]]))
    }

    fn of(&self, holds: &Holds, node: &Node) -> Option<String> {
        let Holds { entry, content } = match &holds.entry.body {
            EntryBody::Hardlink { to } => match self.0.get(to.as_bytes()) {
                Some(carrier) => carrier,
                None => return Some("a link to nothing is expected".into()),
            },
            _ => holds,
        };
        match (&entry.body, &node.body) {
            (EntryBody::Dir, Body::Dir(_)) => {}
            (EntryBody::File { .. }, Body::File(found)) if found.is(content) => {}
            (EntryBody::File { .. }, Body::File(found)) => return Some(format!("other content, {} bytes", found.len())),
            (EntryBody::Symlink { target }, Body::Symlink(found)) if target[..] == **found => {}
            _ => return Some(format!("another kind or target: {:?}", node.kind())),
        }
        let Meta { mode, uid, gid, mtime, xattrs } = &entry.meta;
        let is_link = matches!(node.body, Body::Symlink(_));
        let found = (if is_link { *mode } else { node.mode }, node.uid, node.gid, node.mtime);
        if found != (*mode, *uid, *gid, (mtime.secs, mtime.nanos)) {
            return Some(format!("attributes {found:?} instead of {:?}", (mode, uid, gid, mtime)));
        }
        if !is_link && !xattrs.iter().map(|x| (&x.name, &x.value)).eq(node.xattrs.iter()) {
            return Some("other extended attributes".into());
        }
        None
    }
}

fn is_within(path: &[u8], above: &[u8]) -> bool {
    above.is_empty() || path == above || (path.starts_with(above) && path.get(above.len()) == Some(&b'/'))
}
