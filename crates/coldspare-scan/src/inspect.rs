//! Damage stays at the source: looks at what is read for what git, or the LFS store, promises of it.
//!
//! git doesn't sync loose objects and references by default: after a power cut they may be empty or zeros. Such a file
//! must never replace a good one.
//!
//! Invariants: what is found damaged is never handed over.

use coldspare_core::git::object::{Check, PackSeal, Promise, pack_seal};
use coldspare_core::git::reference::{PackedRefs, TableCheck, parse_loose};
use coldspare_core::git::{self, CapturePass, Damage, Part};
use coldspare_core::{Baseline, Digest, Problem, ProblemKind, RelPath, RootId, seeded_bug};
use coldspare_os::Disk;

use crate::capture::Certainty;
use crate::index::Row;
use crate::read::Opened;
use crate::run::Run;

/// What a file's content has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inspect {
    /// Anything.
    Nothing,
    /// An object, by its name.
    Object(Promise),
    /// A loose reference, or `HEAD`.
    Reference,
    /// Packed references.
    PackedReferences,
    /// Something that is never empty.
    NotEmpty,
    /// A table of references.
    Table,
    /// The names of the tables that count.
    TableList,
}

/// An inspection under way.
pub(crate) enum Inspection {
    Nothing,
    Object(Box<Check>),
    Reference(Vec<u8>),
    PackedReferences { reader: PackedRefs, damage: Option<Damage>, bytes: u64 },
    NotEmpty(u64),
    Table(TableCheck),
    TableList(Vec<u8>),
}

/// Bytes of a loose reference that are looked at; a real one is shorter.
const REFERENCE_BYTES_MAX: usize = 4096;
/// Bytes of a list of tables that are looked at; git merges tables long before there are so many.
const TABLE_LIST_BYTES_MAX: usize = 1 << 20;

impl Inspect {
    pub(crate) fn begin(self) -> Inspection {
        match self {
            Inspect::Nothing => Inspection::Nothing,
            Inspect::Object(promise) => Inspection::Object(Box::new(Check::new(promise))),
            Inspect::Reference => Inspection::Reference(Vec::new()),
            Inspect::PackedReferences => Inspection::PackedReferences { reader: PackedRefs::default(), damage: None, bytes: 0 },
            Inspect::NotEmpty => Inspection::NotEmpty(0),
            Inspect::Table => Inspection::Table(TableCheck::default()),
            Inspect::TableList => Inspection::TableList(Vec::new()),
        }
    }
}

impl Inspection {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Inspection::Nothing => {}
            Inspection::Object(check) => check.update(bytes),
            Inspection::Reference(content) => {
                let wanted = REFERENCE_BYTES_MAX.saturating_sub(content.len()).min(bytes.len());
                content.extend_from_slice(&bytes[..wanted]);
            }
            Inspection::PackedReferences { reader, damage, bytes: count } => {
                *count += bytes.len() as u64;
                if damage.is_none() {
                    *damage = reader.push(bytes, &mut |_, _| ()).err();
                }
            }
            Inspection::NotEmpty(count) => *count += bytes.len() as u64,
            Inspection::Table(check) => check.update(bytes),
            Inspection::TableList(content) => {
                let wanted = TABLE_LIST_BYTES_MAX.saturating_sub(content.len()).min(bytes.len());
                content.extend_from_slice(&bytes[..wanted]);
            }
        }
    }

    fn finish(self) -> Result<Option<PackSeal>, Damage> {
        match self {
            Inspection::Nothing => Ok(None),
            Inspection::Object(check) => check.finish(),
            Inspection::Reference(content) => parse_loose(&content).map(|_| None),
            Inspection::PackedReferences { damage: Some(damage), .. } => Err(damage),
            Inspection::PackedReferences { reader, .. } => reader.finish().map(|()| None),
            Inspection::NotEmpty(0) => Err(Damage("the file is empty".into())),
            Inspection::NotEmpty(_) => Ok(None),
            Inspection::Table(check) => check.finish().map(|()| None),
            Inspection::TableList(content) if content.trim_ascii().is_empty() => Err(Damage("the file is empty".into())),
            Inspection::TableList(_) => Ok(None),
        }
    }
}

impl<D: Disk> Run<'_, D> {
    /// What the content of `path` has to be.
    pub(crate) fn promise(&self, root: RootId, path: &RelPath) -> Inspect {
        if let Some(promise) = Promise::of_lfs(path) {
            return Inspect::Object(promise);
        }
        let base = match self.units.of(root, path) {
            Some(unit) => Some(unit.at.1.clone()),
            // Another name of what a cycle met elsewhere.
            None if git::part(path) != Part::Other => path.parent().and_then(|dir| self.repository_around(root, &dir)),
            None => None,
        };
        let Some(base) = base else { return Inspect::Nothing };
        let inside = path.below(&base).unwrap_or_default();
        match CapturePass::of(inside) {
            CapturePass::References if seeded_bug!(DamagedReferencesTravel) => Inspect::Nothing,
            CapturePass::LooseObjects | CapturePass::Packs if seeded_bug!(DamagedObjectsTravel) => Inspect::Nothing,
            // With reftable, `refs/heads` is a file that keeps old programs out.
            CapturePass::References if inside == b"refs/heads" => Inspect::NotEmpty,
            CapturePass::References if inside == b"reftable/tables.list" => Inspect::TableList,
            CapturePass::References if inside.starts_with(b"reftable/") => Inspect::Table,
            CapturePass::References if inside.ends_with(b"packed-refs") && !inside.contains(&b'/') => Inspect::PackedReferences,
            CapturePass::References => Inspect::Reference,
            CapturePass::LooseObjects | CapturePass::Packs => {
                let promise = inside.strip_prefix(b"objects/").and_then(Promise::of_object);
                promise.map_or(Inspect::Nothing, Inspect::Object)
            }
            CapturePass::Mentions | CapturePass::Derived | CapturePass::Rest => Inspect::Nothing,
        }
    }

    /// What is wrong with the content of a file that was read, in words; `None` when nothing is.
    pub(crate) fn damage(&self, file: &Opened<'_, D>, inspection: Inspection, row: Option<&Row>, digest: Digest) -> Option<String> {
        let known = row.filter(|row| row.version <= self.acked).and_then(|row| Some((row.entry()?.digest()?, row.entry()?.size())));
        let advice = "the standby keeps what it has";
        // What was known of it counts though nobody knows whether the standby has it; where nothing is, it may.
        let had_references = match row {
            Some(row) if row.version == Row::UNSENT && row.entry().is_none() => true,
            Some(row) => row.entry().is_some_and(|entry| entry.size() > 0),
            None => self.cycle.baseline == Baseline::Full && self.cycle.certainty == Certainty::Ask,
        };
        if let Inspection::PackedReferences { bytes: 0, .. } = inspection
            && had_references
        {
            return Some(format!("packed-refs was emptied; {advice}"));
        }
        if let Inspection::TableList(content) = &inspection
            && let Some(absent) = self.absent_table(file.root, file.path, content)
        {
            return Some(format!("the table {absent} that it names is not there; {advice}"));
        }
        let seal = match inspection.finish() {
            Err(damage) => return Some(format!("{damage}; {advice}")),
            Ok(seal) => seal,
        };
        let changed = known.is_some_and(|(known, _)| known != digest) && !seeded_bug!(ChangedPacksTravel);
        match (file.promise, seal) {
            // A pack is called by the hash of what is in it.
            (Inspect::Object(Promise::Pack), _) if changed => Some(format!("the pack's content changed under its name; {advice}")),
            (Inspect::Object(Promise::PackIndex), Some(seal)) => match self.seal_of_pack(file.root, file.path) {
                Some(pack) if pack == seal => None,
                Some(_) => Some(format!("the pack index is not that of its pack; {advice}")),
                None => None, // the pack itself is reported, or was removed meanwhile
            },
            _ => None,
        }
    }

    /// A table of references that a list names and that isn't beside it.
    fn absent_table(&self, root: RootId, list: &RelPath, content: &[u8]) -> Option<String> {
        let names = content.split(|&b| b == b'\n').filter(|name| !name.is_empty());
        let is_there = |name: &[u8]| {
            let table = list.parent().and_then(|dir| dir.join(name).ok());
            table.is_some_and(|table| self.stat_of(root, &table).is_some())
        };
        names.into_iter().find(|name| !is_there(name)).map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// Holds a damaged file back; a repository suffers only when the standby has no good copy of the file.
    pub(crate) fn hold_damaged(&self, root: RootId, path: &RelPath, row: Option<&Row>, detail: String) {
        let is_full = self.cycle.baseline == Baseline::Full;
        let has_copy = row.is_some_and(|row| row.entry().is_some_and(|e| e.digest().is_some()) && (row.version <= self.acked || is_full));
        let is_object = self.units.of(root, path).is_some_and(|unit| {
            matches!(CapturePass::of(path.below(&unit.at.1).unwrap_or_default()), CapturePass::LooseObjects | CapturePass::Packs)
        });
        if is_object && has_copy {
            self.keep(root, path);
            self.capture.held.hold(Problem { root, path: path.clone(), kind: ProblemKind::Damaged, detail });
        } else {
            self.hold(root, path, ProblemKind::Damaged, detail);
        }
    }

    /// What the pack beside an index says of itself.
    fn seal_of_pack(&self, root: RootId, index: &RelPath) -> Option<PackSeal> {
        let disk = &self.capture.disk;
        let stem = index.name().strip_suffix(b".idx")?;
        let dir = disk.open_dir(&self.root(root).dir, index.parent_bytes()).ok()?;
        let file = disk.open_file(&dir, &[stem, b".pack"].concat()).ok()?;
        let size = disk.stat_file(&file).ok()?.size;
        let (mut head, mut tail) = ([0; 12], [0; 20]);
        disk.read_at(&file, 0, &mut head).ok()?;
        disk.read_at(&file, size.checked_sub(20)?, &mut tail).ok()?;
        pack_seal(&head, &tail, size).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(inspect: Inspect, content: &[u8], is_fine: bool) {
        for piece in [1, 3, 1000] {
            let mut inspection = inspect.begin();
            content.chunks(piece).for_each(|bytes| inspection.update(bytes));
            assert_eq!(inspection.finish().is_ok(), is_fine, "{inspect:?} {content:?}");
        }
    }

    #[test]
    fn what_a_power_cut_leaves_is_damage() {
        let id = "a".repeat(40);
        check(Inspect::Reference, format!("{id}\n").as_bytes(), true);
        check(Inspect::Reference, b"ref: refs/heads/main\n", true);
        check(Inspect::Reference, b"", false);
        check(Inspect::Reference, &[0; 41], false);
        check(Inspect::PackedReferences, format!("# pack-refs\n{id} refs/heads/main\n").as_bytes(), true);
        check(Inspect::PackedReferences, &[0; 100], false);
        check(Inspect::NotEmpty, b"", false);
        check(Inspect::NotEmpty, b"x", true);
        check(Inspect::Nothing, b"", true);
    }
}
