//! What has to hold: judged on the standby's tree, by what the active was seen to be and what it was seen to send.
//!
//! - G1: the tree is that of the applied changeset, computed here from the operations that were sent.
//! - G2: per repository, the references are those of one instant, not older than what was acknowledged, and closed; each
//!   plain file is one version that the active had.
//! - G3, G7: what a checkpoint covers is on the standby when it is confirmed.
//! - `applied` never falls, nor does the epoch.

use std::collections::{BTreeMap, BTreeSet};

use coldspare_core::control::Applied;
use coldspare_core::git::family::Repository;
use coldspare_core::{Baseline, Body, Entry, Epoch, Op, Seq, SessionId};
use coldspare_os::FileKind;

use super::repository::{Files, Library, REPOSITORIES, References, base_of, references, repositories};
use crate::model::Seen;

/// A tree as operations make it.
type Expected = BTreeMap<Vec<u8>, Entry>;

/// What a repository was at an instant; `None` while there is none.
type Instant = Option<References>;

/// How far into its history each repository and each plain file was at an instant.
#[derive(Debug, Clone, Default)]
pub(super) struct Mark {
    repositories: BTreeMap<String, usize>,
    plain: BTreeMap<Vec<u8>, usize>,
}

/// The judge.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    library: Library,
    /// What each repository was, from the first instant on.
    history: BTreeMap<String, Vec<Instant>>,
    /// What each plain file was.
    plain: BTreeMap<Vec<u8>, Vec<Option<[u8; 32]>>>,
    sent: BTreeMap<(SessionId, Seq), (Baseline, Vec<Op>)>,
    trees: BTreeMap<(SessionId, Seq), Expected>,
    applied: Option<Applied>,
    /// What the standby's tree was at the last look, and at which instant of the active's that is at the earliest.
    standby: BTreeMap<String, Instant>,
    standby_plain: BTreeMap<Vec<u8>, Option<[u8; 32]>>,
    reached: Mark,
    promised: Epoch,
    /// How many changesets were judged.
    pub(super) judged: u64,
}

impl Oracle {
    /// Takes note of the active's home after a change of `path`, or after any change.
    pub(super) fn saw(&mut self, files: &Files, path: Option<&str>) {
        if path.is_none_or(|p| p.starts_with(REPOSITORIES)) {
            let names = repositories(files);
            let known: BTreeSet<String> = self.history.keys().cloned().collect();
            for name in names.union(&known) {
                let now = names.contains(name).then(|| references(files, name).unwrap_or_default());
                let history = self.history.entry(name.clone()).or_insert_with(|| vec![None]);
                if history.last() != Some(&now) {
                    history.push(now);
                }
            }
        }
        let all = files.iter().filter(|(p, s)| is_plain(p, s)).map(|(p, _)| p).chain(self.plain.keys());
        let paths: BTreeSet<Vec<u8>> = match path {
            Some(path) if is_elsewhere(path.as_bytes()) => return,
            // A folder may have come or gone with all that is in it.
            Some(path) => all.filter(|p| is_within(p, path.as_bytes())).cloned().collect(),
            None => all.cloned().collect(),
        };
        for path in paths {
            let now = files.get(&path).filter(|s| is_plain(&path, s)).map(digest);
            let history = self.plain.entry(path).or_insert_with(|| vec![None]);
            if history.last() != Some(&now) {
                history.push(now);
            }
        }
    }

    /// How far the active is by now.
    pub(super) fn mark(&self) -> Mark {
        let repositories = self.history.iter().map(|(name, history)| (name.clone(), history.len() - 1)).collect();
        let plain = self.plain.iter().map(|(path, history)| (path.clone(), history.len() - 1)).collect();
        Mark { repositories, plain }
    }

    /// Takes note of operations that were sent.
    pub(super) fn sent(&mut self, session: SessionId, seq: Seq, baseline: Baseline, ops: &[Op]) {
        let entry = self.sent.entry((session, seq)).or_insert((baseline, Vec::new()));
        entry.1.extend_from_slice(ops);
    }

    /// Takes note of what the standby has promised.
    ///
    /// # Errors
    /// It fell.
    pub(super) fn promised(&mut self, epoch: Epoch) -> Result<(), String> {
        if epoch < self.promised {
            return Err(format!("the promised epoch fell from {} to {epoch}", self.promised));
        }
        self.promised = epoch;
        Ok(())
    }

    /// Judges the standby's tree; `incomplete` are repositories that it left as they were.
    ///
    /// # Errors
    /// In words, what doesn't hold.
    pub(super) fn judge(&mut self, files: &Files, applied: Option<Applied>, incomplete: &[Repository]) -> Result<(), String> {
        let is_new = applied != self.applied;
        match (self.applied, applied) {
            (Some(before), None) => return Err(format!("the standby forgot changeset {}", before.seq)),
            (Some(before), Some(now)) if now.seq < before.seq => {
                return Err(format!("applied fell from {} to {}", before.seq, now.seq));
            }
            _ => {}
        }
        if is_new && let Some(now) = applied {
            self.grow(now, incomplete)?;
        }
        self.applied = applied;
        let expected = applied.map(|a| &self.trees[&(a.session, a.seq)]).cloned().unwrap_or_default();
        is_tree(files, &expected).map_err(|e| format!("G1: not the tree of {}: {e}", number(applied)))?;
        if is_new {
            self.judged += 1;
            self.judge_repositories(files).map_err(|e| format!("G2 in changeset {}: {e}", number(applied)))?;
            self.judge_plain(files).map_err(|e| format!("G2 in changeset {}: {e}", number(applied)))?;
        }
        Ok(())
    }

    /// Judges a checkpoint that was asked for at `mark` and is confirmed now.
    ///
    /// # Errors
    /// In words, what it should have covered.
    pub(super) fn confirmed(&self, mark: &Mark) -> Result<(), String> {
        for (name, from) in &mark.repositories {
            let now = self.standby.get(name).cloned().unwrap_or_default();
            if !self.history[name][*from..].contains(&now) {
                return Err(format!("G3: a checkpoint is confirmed, {name} is older than it: {now:?}"));
            }
        }
        for (path, from) in &mark.plain {
            let now = self.standby_plain.get(path).copied().unwrap_or_default();
            if !self.plain[path][*from..].contains(&now) {
                return Err(format!("G3: a checkpoint is confirmed, {} is older than it", path.escape_ascii()));
            }
        }
        Ok(())
    }

    /// The tree of a changeset, from the one that it starts from.
    fn grow(&mut self, now: Applied, incomplete: &[Repository]) -> Result<(), String> {
        let key = (now.session, now.seq);
        if self.trees.contains_key(&key) {
            return Ok(());
        }
        let (baseline, ops) = self.sent.get(&key).ok_or_else(|| format!("changeset {} was never sent", now.seq))?;
        let current = self.applied.map(|a| self.trees[&(a.session, a.seq)].clone()).unwrap_or_default();
        let mut tree = match baseline {
            Baseline::Full => Expected::new(),
            Baseline::Delta(from) => {
                if self.applied.map(|a| (a.session, a.seq)) != Some((now.session, *from)) {
                    return Err(format!("changeset {} is based on {from}, the standby was at {}", now.seq, number(self.applied)));
                }
                current.clone()
            }
        };
        let mut removed = BTreeSet::new();
        let mut kept = Vec::new();
        for op in ops {
            match op {
                Op::Delete { path, .. } => {
                    remove(&mut tree, path.as_bytes());
                    removed.insert(path.as_bytes().to_vec());
                }
                Op::Keep { path, .. } => kept.push(path.as_bytes().to_vec()),
                Op::Put { .. } => {}
                Op::Rename { from, to, .. } => {
                    let (from, to) = (from.as_bytes(), to.as_bytes());
                    let mine: Vec<_> = tree.keys().filter(|path| is_within(path, from)).cloned().collect();
                    for path in mine {
                        let entry = tree.remove(&path).expect("it is there");
                        tree.insert([to, &path[from.len()..]].concat(), entry);
                    }
                }
            }
        }
        let mut puts: Vec<_> =
            ops.iter().filter_map(|op| if let Op::Put { path, entry, .. } = op { Some((path, entry)) } else { None }).collect();
        puts.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
        for (path, entry) in puts {
            // What was met before its folder went is gone with it.
            if removed.iter().any(|gone| gone != path.as_bytes() && is_within(path.as_bytes(), gone)) {
                continue;
            }
            if !entry.is_dir() {
                remove(&mut tree, path.as_bytes());
            }
            tree.insert(path.as_bytes().to_vec(), entry.clone());
        }
        kept.extend(incomplete.iter().map(|(_, repository)| repository.as_bytes().to_vec()));
        for base in kept {
            tree.retain(|path, _| !is_within(path, &base));
            let mine = current.iter().filter(|(path, _)| is_within(path, &base));
            tree.extend(mine.map(|(path, entry)| (path.clone(), entry.clone())));
        }
        self.trees.insert(key, tree);
        Ok(())
    }

    fn judge_repositories(&mut self, files: &Files) -> Result<(), String> {
        let names = repositories(files);
        let known: BTreeSet<String> = self.history.keys().cloned().collect();
        let mut standby = BTreeMap::new();
        for name in names.union(&known) {
            let now = if names.contains(name) { Some(references(files, name)?) } else { None };
            let history = self.history.get(name).ok_or_else(|| format!("{name} was never a repository"))?;
            let from = self.reached.repositories.get(name).copied().unwrap_or_default();
            let Some(at) = history[from..].iter().position(|then| *then == now) else {
                let earlier = history.iter().position(|then| *then == now);
                let why = match earlier {
                    Some(_) => "older than what was acknowledged".to_string(),
                    None => torn(history, now.as_ref()),
                };
                return Err(format!("the references of {name} are {why}: {now:?}"));
            };
            self.reached.repositories.insert(name.clone(), from + at);
            if let Some(references) = &now {
                self.library.closed(files, name, references)?;
            }
            standby.insert(name.clone(), now);
        }
        self.standby = standby;
        let has_head = |p: &[u8]| {
            let text = String::from_utf8_lossy(p).into_owned();
            let name = text.strip_prefix(REPOSITORIES).and_then(|rest| rest.split('/').nth(1).map(str::to_string));
            name.is_some_and(|name| files.contains_key(format!("{REPOSITORIES}/{name}/HEAD").as_bytes()))
        };
        match files.keys().find(|p| super::repository::is_transient(p) && has_head(p)) {
            Some(path) => Err(format!("{} should not have travelled", path.escape_ascii())),
            None => Ok(()),
        }
    }

    /// The folders of repositories that lack an object that they need, and of their families.
    pub(super) fn broken(&mut self, files: &Files) -> BTreeSet<Vec<u8>> {
        let names = repositories(files);
        let is_whole = |library: &mut Library, name: &str| references(files, name).and_then(|r| library.closed(files, name, &r)).is_ok();
        let mut broken: BTreeSet<String> = names.iter().filter(|name| !is_whole(&mut self.library, name)).cloned().collect();
        loop {
            let before = broken.len();
            for (name, base) in names.iter().filter_map(|name| Some((name, base_of(files, name)?))) {
                if broken.contains(name) || broken.contains(&base) {
                    broken.extend([name.clone(), base]);
                }
            }
            if broken.len() == before {
                return broken.iter().map(|name| format!("{REPOSITORIES}/{name}").into_bytes()).collect();
            }
        }
    }

    fn judge_plain(&mut self, files: &Files) -> Result<(), String> {
        let mut standby = BTreeMap::new();
        let mut paths: BTreeSet<&Vec<u8>> = files.iter().filter(|(p, s)| is_plain(p, s)).map(|(p, _)| p).collect();
        paths.extend(self.plain.keys());
        for path in paths {
            let now = files.get(path).filter(|s| is_plain(path, s)).map(digest);
            let history = self.plain.get(path).ok_or_else(|| format!("{} was never there", path.escape_ascii()))?;
            let from = self.reached.plain.get(path).copied().unwrap_or_default();
            let at = history[from..].iter().position(|then| *then == now);
            let at = at.ok_or_else(|| {
                let why = if history.contains(&now) { "older than what was acknowledged" } else { "no version that the active had" };
                format!("{} is {why}", path.escape_ascii())
            })?;
            self.reached.plain.insert(path.clone(), from + at);
            standby.insert(path.clone(), now);
        }
        self.standby_plain = standby;
        Ok(())
    }
}

/// What is otherwise in one tree than in the other, by what both are compared with.
///
/// # Errors
/// In words: the first difference.
pub(super) fn are_equal(active: &Files, standby: &Files) -> Result<(), String> {
    let carried = |files: &Files| files.iter().filter(|(p, _)| !is_own(p)).map(|(p, s)| (p.clone(), s.clone())).collect::<Files>();
    let (active, standby) = (carried(active), carried(standby));
    for (path, here) in &active {
        let there = standby.get(path).ok_or_else(|| format!("{} is missing", path.escape_ascii()))?;
        let same = here.content == there.content
            && (here.stat.kind, here.stat.mode, here.stat.mtime) == (there.stat.kind, there.stat.mode, there.stat.mtime);
        if !same {
            return Err(format!("{} differs: {:?} and {:?}", path.escape_ascii(), here.stat, there.stat));
        }
    }
    match standby.keys().find(|p| !active.contains_key(*p)) {
        Some(path) => Err(format!("{} should not be there", path.escape_ascii())),
        None => Ok(()),
    }
}

fn number(applied: Option<Applied>) -> String {
    applied.map_or("nothing".into(), |a| a.seq.to_string())
}

/// In words, how references come to be none of one instant.
fn torn(history: &[Instant], now: Option<&References>) -> String {
    let Some(now) = now else { return "gone, which it never was".into() };
    let apart: Vec<String> = now
        .iter()
        .map(|(name, value)| {
            let at = history.iter().position(|then| then.as_ref().is_some_and(|then| then.get(name) == Some(value)));
            format!("{name} since {at:?}")
        })
        .collect();
    format!("of no one instant of {} ({})", history.len(), apart.join(", "))
}

fn is_own(path: &[u8]) -> bool {
    path.is_empty() || path == b".coldspare" || path.starts_with(b".coldspare/")
}

fn is_plain(path: &[u8], seen: &Seen) -> bool {
    seen.stat.kind == FileKind::File && !is_elsewhere(path)
}

/// Whether a path is no plain file: coldspare's own, a repository's, or of a repository that is being removed.
fn is_elsewhere(path: &[u8]) -> bool {
    is_own(path) || path.starts_with(REPOSITORIES.as_bytes()) || path.starts_with(b"shared/tmp/deleted-")
}

fn digest(seen: &Seen) -> [u8; 32] {
    *blake3::hash(&seen.content).as_bytes()
}

pub(super) fn is_within(path: &[u8], dir: &[u8]) -> bool {
    path == dir || dir.is_empty() || path.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/"))
}

fn remove(tree: &mut Expected, path: &[u8]) {
    tree.retain(|p, _| !is_within(p, path));
}

fn is_tree(files: &Files, expected: &Expected) -> Result<(), String> {
    for (path, entry) in expected.iter().filter(|(p, _)| !is_own(p)) {
        let name = || path.escape_ascii().to_string();
        let seen = files.get(path).ok_or_else(|| format!("{} is missing", name()))?;
        let same_body = match &entry.body {
            Body::Dir => seen.stat.kind == FileKind::Dir,
            Body::File { digest: wanted, size, .. } => {
                seen.stat.kind == FileKind::File && seen.stat.size == *size && digest(seen) == wanted.0
            }
            Body::Symlink { target } => seen.stat.kind == FileKind::Symlink && seen.content == *target,
            Body::Hardlink { to } => files.get(to.as_bytes()).is_some_and(|other| other.stat.ino == seen.stat.ino),
        };
        let meta = &entry.meta;
        if !same_body {
            return Err(format!("{} has other content", name()));
        }
        if (seen.stat.mode, seen.stat.mtime) != (meta.mode, (meta.mtime.secs, meta.mtime.nanos)) {
            return Err(format!("{} has other attributes: {:?} for {meta:?}", name(), seen.stat));
        }
    }
    match files.keys().find(|p| !is_own(p) && !expected.contains_key(*p)) {
        Some(path) => Err(format!("{} should not be there", path.escape_ascii())),
        None => Ok(()),
    }
}
