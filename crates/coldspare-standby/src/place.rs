//! Where a path of a changeset is staged.
//!
//! A path whose folder the tree has is staged by itself and renamed into place. A folder that the tree doesn't have is
//! staged whole, with all below it, and renamed once.

use std::collections::HashMap;
use std::io::ErrorKind;

use coldspare_core::{RelPath, RootId, key};
use coldspare_os::Disk;

use crate::error::{StandbyError, io};
use crate::row::{Action, Staged};
use crate::standby::{Changeset, Standby};

/// What a path is to the tree that the changeset starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Its folder is in the tree.
    Alone,
    /// It is, or is below, a folder that is wholly new.
    InTree {
        /// That folder.
        top: RelPath,
    },
}

/// Remembers, for one batch, what was found out about folders.
pub(crate) struct Places<'a, D: Disk> {
    standby: &'a Standby<D>,
    changeset: &'a Changeset<D>,
    tops: HashMap<(RootId, RelPath), Option<RelPath>>,
    open: HashMap<(RootId, RelPath), std::sync::Arc<D::Dir>>,
}

/// LIMIT: folders that one batch keeps open.
const OPEN_MAX: usize = 128;

impl<'a, D: Disk> Places<'a, D> {
    pub(crate) fn new(standby: &'a Standby<D>, changeset: &'a Changeset<D>) -> Places<'a, D> {
        Places { standby, changeset, tops: HashMap::new(), open: HashMap::new() }
    }

    /// Whether the folder `dir` is, or is below, a wholly new one; which.
    pub(crate) fn new_top(&mut self, root: RootId, dir: &RelPath) -> Result<Option<RelPath>, StandbyError> {
        if dir.is_root() {
            return Ok(None);
        }
        if let Some(known) = self.tops.get(&(root, dir.clone())) {
            return Ok(known.clone());
        }
        let above = self.new_top(root, &dir.parent().unwrap_or_else(RelPath::root))?;
        let top = match above {
            Some(top) => Some(top),
            None => {
                let known = self.changeset.manifest.manifest(root, dir)?;
                (!known.is_some_and(|row| row.entry.is_dir())).then(|| dir.clone())
            }
        };
        self.tops.insert((root, dir.clone()), top.clone());
        Ok(top)
    }

    /// Where an entry that isn't a folder goes.
    pub(crate) fn of_file(&mut self, root: RootId, path: &RelPath) -> Result<Place, StandbyError> {
        let dir = path.parent().unwrap_or_else(RelPath::root);
        Ok(self.new_top(root, &dir)?.map_or(Place::Alone, |top| Place::InTree { top }))
    }

    /// A folder to create the staged file in, the name for it there, and what to record.
    pub(crate) fn spot(&mut self, root: RootId, path: &RelPath) -> Result<(Spot<'_, D>, Vec<u8>, Action), StandbyError> {
        match self.of_file(root, path)? {
            Place::Alone => {
                let name = self.standby.fresh_name();
                let from = Staged([b"f/", name.as_slice()].concat());
                Ok((Spot::Files(&self.standby.root(root).files), name, Action::Place { from }))
            }
            Place::InTree { top } => {
                let dir = path.parent().unwrap_or_else(RelPath::root);
                let at = self.in_tree(root, &top, path);
                Ok((Spot::Tree(self.tree_dir(root, &top, &dir)?), path.name().to_vec(), Action::Carried { at }))
            }
        }
    }

    /// The staged folder for `dir`, which is `top` or below it; made when it isn't there.
    pub(crate) fn tree_dir(&mut self, root: RootId, top: &RelPath, dir: &RelPath) -> Result<std::sync::Arc<D::Dir>, StandbyError> {
        if let Some(open) = self.open.get(&(root, dir.clone())) {
            return Ok(open.clone());
        }
        if self.open.len() >= OPEN_MAX {
            self.open.clear();
        }
        let disk = &self.standby.disk;
        let trees = &self.standby.root(root).trees;
        let staged = self.in_tree(root, top, dir);
        let below_t = &staged.0[2..];
        let open = match disk.open_dir(trees, below_t) {
            Ok(open) => open,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let (parent, name) = if dir == top {
                    (None, below_t)
                } else {
                    let above = dir.parent().unwrap_or_else(RelPath::root);
                    (Some(self.tree_dir(root, top, &above)?), dir.name())
                };
                let parent = parent.as_deref().unwrap_or(trees);
                match disk.create_dir(parent, name) {
                    Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(io("making the folder", dir.as_bytes())(e)),
                    _ => {}
                }
                disk.open_dir(parent, name).map_err(io("opening the staged folder", dir.as_bytes()))?
            }
            Err(e) => return Err(io("opening the staged folder", dir.as_bytes())(e)),
        };
        let open = std::sync::Arc::new(open);
        self.open.insert((root, dir.clone()), open.clone());
        Ok(open)
    }

    /// `t/<tree>[/…]` for `path`, which is `top` or below it.
    pub(crate) fn in_tree(&self, root: RootId, top: &RelPath, path: &RelPath) -> Staged {
        let id = blake3::hash(&key::encode(root, top)).to_hex();
        let mut out = [b"t/", self.changeset.tag.as_slice(), b"-", &id.as_bytes()[..24]].concat();
        let below = path.below(top).unwrap_or_default();
        if !below.is_empty() {
            out.push(b'/');
            out.extend_from_slice(below);
        }
        Staged(out)
    }
}

/// A held folder to stage in.
pub(crate) enum Spot<'a, D: Disk> {
    Files(&'a D::Dir),
    Tree(std::sync::Arc<D::Dir>),
}

impl<D: Disk> Spot<'_, D> {
    pub(crate) fn dir(&self) -> &D::Dir {
        match self {
            Spot::Files(dir) => dir,
            Spot::Tree(dir) => dir,
        }
    }
}

impl Action {
    /// Where the content is staged.
    pub fn staged(&self) -> Option<&Staged> {
        match self {
            Action::Place { from } | Action::Carried { at: from } => Some(from),
            Action::Attributes | Action::Record | Action::Remove | Action::Rename { .. } => None,
        }
    }
}

impl Staged {
    /// The folder below `stage` (`f` or `t…`) and the name in it.
    pub(crate) fn split(&self) -> (&[u8], &[u8]) {
        let at = self.0.iter().rposition(|&b| b == b'/').unwrap_or(0);
        (&self.0[..at], self.0.get(at + 1..).unwrap_or_default())
    }
}

impl<D: Disk> Standby<D> {
    /// The held folder of a staged thing, and its name there.
    pub(crate) fn staged_dir(&self, root: RootId, staged: &Staged) -> Result<(D::Dir, Vec<u8>), StandbyError> {
        let (dir, name) = staged.split();
        let root = self.root(root);
        let open = match dir.strip_prefix(b"t/") {
            Some(below) => self.disk.open_dir(&root.trees, below),
            None if dir == b"t" => self.disk.open_dir(&root.trees, b""),
            None => self.disk.open_dir(&root.files, b""),
        };
        Ok((open.map_err(io("opening the staged folder of", &staged.0))?, name.to_vec()))
    }
}
