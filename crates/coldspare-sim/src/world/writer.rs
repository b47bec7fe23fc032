//! Who writes to the active's home: git-like, one file operation a step, in git's order and with git's fsyncs.
//!
//! Each operation is planned on the home as it is, and then taken step by step, so that a capture may see it after any
//! of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use sha2::{Digest, Sha256};

use super::objects::{Object, ObjectName, hex, pack};
use super::repository::{Files, Library, NAMESPACES, REPOSITORIES, References, base_of, reachable, references, repositories};
use crate::Chance;
use crate::model::ModelDisk;

/// The root, in the disk's own tree.
pub(super) const HOME: &str = "/home";

/// One file operation.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Dir(String),
    Write(String, Vec<u8>),
    Part(String, u64, Vec<u8>),
    Move(String, String),
    Remove(String),
    /// Unless something is in it.
    RemoveDir(String),
    /// All that was done before is durable.
    Settle,
}

/// The writer.
#[derive(Debug)]
pub(super) struct Writer {
    disk: ModelDisk,
    chance: Chance,
    library: Library,
    steps: VecDeque<Step>,
    count: u64,
    /// What is being done.
    pub(super) operation: String,
}

const BRANCHES: [&str; 6] = [
    "refs/heads/main",
    "refs/heads/dev",
    "refs/heads/topic",
    "refs/heads/topic/a",
    "stash-refs/pull-requests/1/from",
    "stash-refs/pull-requests/2/from",
];
const PLAIN: [&str; 3] = ["shared/bitbucket.properties", "shared/data/attachments/1", "shared/data/attachments/2"];
/// Folders that have nothing to do with git.
const FOLDERS: &str = "shared/data/attachments/of";
const LARGE: &str = "shared/data/dump.sql";
/// LIMIT: repositories at once.
const REPOSITORIES_MAX: usize = 4;

impl Writer {
    /// Someone who writes to this disk.
    pub(super) fn new(disk: ModelDisk, chance: Chance) -> Writer {
        Writer { disk, chance, library: Library::default(), steps: VecDeque::new(), count: 0, operation: String::new() }
    }

    /// Makes a home of a few repositories, durably.
    pub(super) fn begin(&mut self) {
        for dir in [REPOSITORIES, "shared/data/attachments", "shared/data/git-lfs/storage", "shared/tmp"] {
            self.disk.make_dirs(format!("{HOME}/{dir}"));
        }
        for _ in 0..=self.chance.below(2) {
            self.make_repository();
        }
        for _ in 0..self.chance.below(5) {
            self.finish();
            self.plan();
        }
        self.finish();
        self.disk.settle();
    }

    /// Whether an operation is under way.
    pub(super) fn is_busy(&self) -> bool {
        !self.steps.is_empty()
    }

    /// Takes the next step, of the next operation if none is under way; the paths that changed, below the root.
    pub(super) fn step(&mut self) -> Vec<String> {
        if self.steps.is_empty() {
            self.plan();
        }
        let Some(step) = self.steps.pop_front() else { return Vec::new() };
        let at = |path: &str| format!("{HOME}/{path}");
        match &step {
            Step::Dir(path) => self.disk.make_dirs(at(path)),
            Step::Write(path, content) => self.disk.write(at(path), content).expect("a folder"),
            Step::Part(path, offset, bytes) => self.disk.write_part(at(path), *offset, bytes).expect("a folder"),
            Step::Move(from, to) => self.disk.move_to(at(from), at(to)).expect("both folders"),
            // A power cut may have taken it: that is no failure to git.
            Step::Remove(path) => match self.disk.remove(at(path)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => panic!("{path}: {e}"),
                _ => {}
            },
            Step::RemoveDir(path) => {
                if self.disk.names(at(path)).is_ok_and(|names| names.is_empty()) {
                    self.disk.remove(at(path)).expect("an empty folder");
                }
            }
            Step::Settle => self.disk.settle(),
        }
        match step {
            Step::Settle => Vec::new(),
            Step::Dir(path) | Step::Write(path, _) | Step::Part(path, ..) | Step::Remove(path) | Step::RemoveDir(path) => vec![path],
            Step::Move(from, to) => vec![from, to],
        }
    }

    /// Takes all steps that are planned.
    pub(super) fn finish(&mut self) {
        while self.is_busy() {
            self.step();
        }
    }

    /// The host went down: what was under way is over, and somebody cleans up what it left.
    pub(super) fn recover(&mut self, disk: ModelDisk) {
        self.disk = disk;
        self.steps.clear();
        let files = self.files();
        for path in files.keys().filter(|p| super::repository::is_transient(p)) {
            let _ = self.disk.remove([HOME.as_bytes(), b"/", path].concat());
        }
        for name in repositories(&files) {
            let repository = format!("{REPOSITORIES}/{name}");
            if !files.contains_key(format!("{repository}/HEAD").as_bytes()) {
                self.disk.remove(format!("{HOME}/{repository}")).expect("a folder");
            }
        }
        self.disk.settle();
    }

    fn files(&self) -> Files {
        self.disk.tree(HOME).expect("a home")
    }

    fn next(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    fn do_all(&mut self, steps: impl IntoIterator<Item = Step>) {
        self.steps.extend(steps);
    }

    /// Plans one operation.
    fn plan(&mut self) {
        let files = self.files();
        let names: Vec<String> = repositories(&files).into_iter().collect();
        if names.is_empty() {
            return self.make_repository();
        }
        let name = self.chance.pick(&names).clone();
        let forks = names.iter().any(|n| base_of(&files, n).as_deref() == Some(&name));
        let what = self.chance.below(24);
        self.operation = format!("{what} on {name}");
        match what {
            0..=7 => self.push(&files, &name),
            8 | 9 => self.pack_references(&files, &name),
            10..=12 => self.repack(&files, &names, &name),
            13 => self.prune(&files, &names, &name),
            14 | 15 => {
                let all = references(&files, &name).expect("references");
                if let Some(reference) = all.keys().nth(self.chance.below(all.len().max(1) as u64) as usize) {
                    self.delete(&files, &name, reference);
                }
            }
            16 if names.len() < REPOSITORIES_MAX && base_of(&files, &name).is_none() => self.fork(&files, &name),
            17 if names.len() < REPOSITORIES_MAX => self.make_repository(),
            18 if !forks && names.len() > 1 => self.delete_repository(&files, &name),
            19 if !forks => {
                let to = self.new_name();
                self.do_all([Step::Move(format!("{REPOSITORIES}/{name}"), to), Step::Settle]);
            }
            20 => self.rewrite(),
            21 => self.move_folder(&files),
            22 => self.store_large(&files),
            _ => self.store_lfs(),
        }
    }

    fn new_name(&mut self) -> String {
        format!("{REPOSITORIES}/{}", self.next())
    }

    fn make_repository(&mut self) {
        let repository = self.new_name();
        self.lay_out(&repository);
        self.complete(&repository);
    }

    fn lay_out(&mut self, repository: &str) {
        let dirs = ["", "/refs", "/refs/heads", "/objects", "/objects/info", "/objects/pack"];
        self.do_all(dirs.iter().map(|dir| Step::Dir(format!("{repository}{dir}"))));
        self.do_all([Step::Write(format!("{repository}/config"), b"[core]\n\tbare = true\n".to_vec())]);
    }

    fn complete(&mut self, repository: &str) {
        self.replace(&format!("{repository}/HEAD"), b"ref: refs/heads/main\n".to_vec());
        self.do_all([Step::Settle]);
    }

    /// Replaces a file as git does: a lock, made durable, and a rename.
    fn replace(&mut self, path: &str, content: Vec<u8>) {
        let lock = format!("{path}.lock");
        self.do_all([Step::Write(lock.clone(), content), Step::Settle, Step::Move(lock, path.into())]);
    }

    fn push(&mut self, files: &Files, name: &str) {
        let repository = format!("{REPOSITORIES}/{name}");
        let all = references(files, name).expect("references");
        let branch = *self.chance.pick(&BRANCHES);
        let mut parents: Vec<ObjectName> = all.get(branch).or_else(|| all.get(BRANCHES[0])).into_iter().copied().collect();
        if self.chance.happens(1, 5) {
            parents.extend(all.values().next());
        }
        let number = self.next();
        let size = 20 + self.chance.below(200) as usize;
        let blob = Object::blob(self.chance.bytes(size));
        let tree = Object::tree(blob.name());
        let commit = Object::commit(tree.name(), &parents, &format!("number {number}"));
        let tip = commit.name();
        let objects: BTreeMap<_, _> = [blob, tree, commit].into_iter().map(|o| (o.name(), o)).collect();
        if self.chance.happens(1, 3) {
            self.write_pack(&repository, &objects, number);
        } else {
            self.write_loose(&repository, &objects, number);
        }
        // A branch can't be where a folder of branches is.
        let in_the_way: Vec<String> = all
            .keys()
            .filter(|known| known.starts_with(&format!("{branch}/")) || branch.starts_with(&format!("{known}/")))
            .cloned()
            .collect();
        for known in in_the_way {
            self.delete(files, name, &known);
        }
        self.move_reference(&repository, branch, tip);
    }

    fn write_loose(&mut self, repository: &str, objects: &BTreeMap<ObjectName, Object>, number: u64) {
        for (name, object) in objects {
            let name = hex(name);
            let dir = format!("{repository}/objects/{}", &name[..2]);
            let (file, end) = (object.loose(), format!("{dir}/{}", &name[2..]));
            let transient = format!("{dir}/tmp_obj_{number}");
            let half = file.len() / 2;
            self.do_all([
                Step::Dir(dir),
                Step::Part(transient.clone(), 0, file[..half].to_vec()),
                Step::Part(transient.clone(), half as u64, file[half..].to_vec()),
                Step::Settle,
                Step::Move(transient, end),
            ]);
        }
    }

    /// A pushed pack arrives in a folder of its own and moves when it is whole.
    fn write_pack(&mut self, repository: &str, objects: &BTreeMap<ObjectName, Object>, number: u64) {
        let (pack, index, name) = pack(objects);
        let incoming = format!("{repository}/objects/tmp_objdir-incoming-{number}");
        let here = format!("{incoming}/pack");
        let there = format!("{repository}/objects/pack/{name}");
        self.do_all([
            Step::Dir(here.clone()),
            Step::Write(format!("{here}/{name}.pack"), pack),
            Step::Write(format!("{here}/{name}.idx"), index),
            Step::Settle,
            Step::Move(format!("{here}/{name}.pack"), format!("{there}.pack")),
            Step::Move(format!("{here}/{name}.idx"), format!("{there}.idx")),
            Step::RemoveDir(here),
            Step::RemoveDir(incoming),
        ]);
    }

    fn move_reference(&mut self, repository: &str, reference: &str, to: ObjectName) {
        let path = format!("{repository}/{reference}");
        let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir).to_string();
        // An empty folder may be left where branches were.
        self.do_all([Step::Settle, Step::RemoveDir(path.clone()), Step::Dir(dir)]);
        self.replace(&path, format!("{}\n", hex(&to)).into_bytes());
    }

    /// Deletes a reference: first of the packed ones, then its own file.
    fn delete(&mut self, files: &Files, name: &str, reference: &str) {
        let repository = format!("{REPOSITORIES}/{name}");
        for (dir, packed) in NAMESPACES.iter().filter(|(dir, _)| reference.starts_with(&format!("{dir}/"))) {
            let known = files.get(format!("{repository}/{packed}").as_bytes());
            let text = known.map(|seen| String::from_utf8_lossy(&seen.content).into_owned()).unwrap_or_default();
            // What an earlier step of the same operation left out of it is left out here too.
            let planned = self.steps.iter().rev().find_map(|step| match step {
                Step::Write(path, content) if *path == format!("{repository}/{packed}.new") => Some(content.clone()),
                _ => None,
            });
            let text = planned.map(|content| String::from_utf8_lossy(&content).into_owned()).unwrap_or(text);
            if text.lines().any(|l| l.ends_with(&format!(" {reference}"))) {
                let left: String = text.lines().filter(|l| !l.ends_with(&format!(" {reference}"))).map(|l| format!("{l}\n")).collect();
                self.write_packed(&repository, packed, left);
            }
            let path = format!("{repository}/{reference}");
            if files.contains_key(path.as_bytes()) {
                self.remove_loose(&path, &format!("{repository}/{dir}"));
            }
        }
    }

    fn write_packed(&mut self, repository: &str, packed: &str, text: String) {
        let path = format!("{repository}/{packed}");
        self.do_all([
            Step::Write(format!("{path}.lock"), Vec::new()),
            Step::Write(format!("{path}.new"), text.into_bytes()),
            Step::Settle,
            Step::Move(format!("{path}.new"), path.clone()),
            Step::Settle,
            Step::Remove(format!("{path}.lock")),
        ]);
    }

    fn remove_loose(&mut self, path: &str, top: &str) {
        let lock = format!("{path}.lock");
        self.do_all([Step::Write(lock.clone(), Vec::new()), Step::Remove(path.into()), Step::Remove(lock)]);
        let mut dir = path;
        while let Some((above, _)) = dir.rsplit_once('/').filter(|(above, _)| above.len() > top.len() && *above != format!("{top}/heads")) {
            self.do_all([Step::RemoveDir(above.into())]);
            dir = above;
        }
    }

    fn pack_references(&mut self, files: &Files, name: &str) {
        let repository = format!("{REPOSITORIES}/{name}");
        let all = references(files, name).expect("references");
        let (dir, packed) = *self.chance.pick(&NAMESPACES);
        let mine: References = all.into_iter().filter(|(n, _)| n.starts_with(&format!("{dir}/"))).collect();
        if mine.is_empty() {
            return;
        }
        let lines = mine.iter().map(|(name, value)| format!("{} {name}\n", hex(value)));
        let text = format!("# pack-refs with: peeled fully-peeled sorted \n{}", lines.collect::<String>());
        self.write_packed(&repository, packed, text);
        for reference in mine.keys() {
            let path = format!("{repository}/{reference}");
            if files.contains_key(path.as_bytes()) {
                self.remove_loose(&path, &format!("{repository}/{dir}"));
            }
        }
    }

    /// All that this repository, and those that borrow from it, need.
    fn needed(&mut self, files: &Files, names: &[String], name: &str) -> (BTreeMap<ObjectName, Object>, BTreeSet<ObjectName>) {
        let mut tips = Vec::new();
        let mut objects = self.library.all(files, name);
        for other in names.iter().filter(|n| *n == name || base_of(files, n).as_deref() == Some(name)) {
            tips.extend(references(files, other).expect("references").into_values());
            objects.extend(self.library.own(files, other));
        }
        let needed = reachable(&objects, tips.into_iter());
        (objects, needed)
    }

    fn repack(&mut self, files: &Files, names: &[String], name: &str) {
        let repository = format!("{REPOSITORIES}/{name}");
        let (_, needed) = self.needed(files, names, name);
        let own: BTreeMap<_, _> = self.library.own(files, name).into_iter().filter(|(n, _)| needed.contains(n)).collect();
        if own.is_empty() {
            return;
        }
        let (content, index, new) = pack(&own);
        let folder = format!("{repository}/objects/pack");
        let number = self.next();
        let old: Vec<String> = super::repository::below(files, &folder)
            .filter_map(|(path, _)| String::from_utf8_lossy(path).strip_suffix(".idx").map(str::to_string))
            .filter(|old| *old != new)
            .collect();
        self.do_all([Step::Settle]);
        if !files.contains_key(format!("{folder}/{new}.idx").as_bytes()) {
            self.do_all([
                Step::Write(format!("{folder}/tmp_pack_{number}"), content),
                Step::Write(format!("{folder}/tmp_idx_{number}"), index),
                Step::Settle,
                Step::Move(format!("{folder}/tmp_pack_{number}"), format!("{folder}/{new}.pack")),
                Step::Move(format!("{folder}/tmp_idx_{number}"), format!("{folder}/{new}.idx")),
                Step::Settle,
            ]);
        }
        for old in old {
            self.do_all([Step::Remove(format!("{folder}/{old}.idx")), Step::Remove(format!("{folder}/{old}.pack"))]);
        }
        self.remove_objects(files, &repository, |n| own.contains_key(n));
    }

    fn prune(&mut self, files: &Files, names: &[String], name: &str) {
        let (_, needed) = self.needed(files, names, name);
        self.do_all([Step::Settle]);
        self.remove_objects(files, &format!("{REPOSITORIES}/{name}"), |n| !needed.contains(n));
    }

    fn remove_objects(&mut self, files: &Files, repository: &str, which: impl Fn(&ObjectName) -> bool) {
        let objects = format!("{repository}/objects");
        for (path, _) in super::repository::below(files, &objects) {
            let path = String::from_utf8_lossy(path);
            let name = path.split_once('/').and_then(|(dir, rest)| super::objects::unhex(&format!("{dir}{rest}")));
            if name.is_some_and(|n| which(&n)) {
                let dir = format!("{objects}/{}", &path[..2]);
                self.do_all([Step::Remove(format!("{objects}/{path}")), Step::RemoveDir(dir)]);
            }
        }
    }

    fn fork(&mut self, files: &Files, base: &str) {
        let repository = self.new_name();
        self.lay_out(&repository);
        let alternates = format!("{HOME}/{REPOSITORIES}/{base}/objects\n");
        let lines = references(files, base).expect("references").into_iter().filter(|(name, _)| name.starts_with("refs/"));
        let lines: String = lines.map(|(name, value)| format!("{} {name}\n", hex(&value))).collect();
        let packed = format!("# pack-refs with: peeled fully-peeled sorted \n{lines}");
        self.do_all([Step::Write(format!("{repository}/objects/info/alternates"), alternates.into_bytes()), Step::Settle]);
        self.replace(&format!("{repository}/packed-refs"), packed.into_bytes());
        self.complete(&repository);
    }

    fn delete_repository(&mut self, files: &Files, name: &str) {
        let (from, to) = (format!("{REPOSITORIES}/{name}"), format!("shared/tmp/deleted-{name}"));
        self.do_all([Step::Move(from.clone(), to.clone()), Step::Settle]);
        let inside: Vec<_> = super::repository::below(files, &from).map(|(p, _)| String::from_utf8_lossy(p).into_owned()).collect();
        self.do_all(inside.into_iter().rev().map(|path| Step::Remove(format!("{to}/{path}"))));
        self.do_all([Step::Remove(to)]);
    }

    /// Rewrites a plain file: by a rename, in place, or by its end.
    fn rewrite(&mut self) {
        let path = self.chance.pick(&PLAIN).to_string();
        let size = 1 + self.chance.below(400) as usize;
        let content = self.chance.bytes(size);
        let half = size / 2;
        match self.chance.below(3) {
            0 => {
                let number = self.next();
                let other = format!("shared/tmp/new-{number}");
                self.do_all([Step::Write(other.clone(), content), Step::Settle, Step::Move(other, path)]);
            }
            1 => {
                self.do_all([Step::Write(path.clone(), content[..half].to_vec()), Step::Part(path, half as u64, content[half..].to_vec())])
            }
            _ => self.do_all([Step::Part(path, self.chance.clone().below(300), content)]),
        }
    }

    /// Makes a folder of plain files, or renames one, or one in it.
    fn move_folder(&mut self, files: &Files) {
        let is_folder = |path: &&Vec<u8>| path.starts_with(FOLDERS.as_bytes()) && path.len() > FOLDERS.len() + 1;
        let all = files.iter().filter(|(_, seen)| seen.stat.kind == coldspare_os::FileKind::Dir).map(|(path, _)| path);
        let known: Vec<String> = all.filter(is_folder).map(|path| String::from_utf8_lossy(path).into_owned()).collect();
        let new = format!("{FOLDERS}/{}", self.next());
        if known.len() < 3 || self.chance.happens(1, 4) {
            self.do_all([Step::Dir(FOLDERS.into()), Step::Dir(new.clone()), Step::Dir(format!("{new}/in"))]);
            for name in ["a", "b", "in/c"] {
                let content = self.chance.bytes(20);
                self.do_all([Step::Write(format!("{new}/{name}"), content)]);
            }
            return self.do_all([Step::Settle]);
        }
        let from = self.chance.pick(&known).clone();
        let to = if self.chance.happens(1, 2) {
            new
        } else {
            self.do_all([Step::Dir(new.clone())]);
            format!("{new}/{}", self.next())
        };
        if self.chance.happens(1, 4) {
            let content = self.chance.bytes(20);
            self.do_all([Step::Write(format!("{from}/a"), content)]);
        }
        self.do_all([Step::Move(from.clone(), to.clone())]);
        match self.chance.below(6) {
            // Before anybody has seen it there.
            2 | 3 => {
                let last = format!("{FOLDERS}/{}", self.next());
                self.do_all([Step::Move(to, last)]);
            }
            0 => self.do_all([Step::Write(format!("{to}/a"), b"written behind it".to_vec())]),
            1 => self.do_all([Step::Dir(from.clone()), Step::Write(format!("{from}/a"), b"another".to_vec())]),
            _ => {}
        }
        self.do_all([Step::Settle]);
    }

    /// A file that travels in segments.
    fn store_large(&mut self, files: &Files) {
        if !self.chance.happens(1, 4) {
            return self.rewrite();
        }
        let bytes = self.chance.bytes(4000);
        match files.get(LARGE.as_bytes()) {
            None => {
                let all = bytes.iter().copied().cycle().take(140_000 + self.chance.below(100_000) as usize).collect();
                self.do_all([Step::Write(LARGE.into(), all), Step::Settle]);
            }
            Some(seen) => {
                let at = self.chance.below(seen.content.len() as u64);
                self.do_all([Step::Part(LARGE.into(), at, bytes)]);
            }
        }
    }

    fn store_lfs(&mut self) {
        let size = 30 + self.chance.below(100) as usize;
        let content = self.chance.bytes(size);
        let name = hex(&Sha256::digest(&content));
        let number = self.next();
        let dir = format!("shared/data/git-lfs/storage/{}", &name[..2]);
        let other = format!("shared/tmp/upload-{number}");
        self.do_all([
            Step::Write(other.clone(), content),
            Step::Settle,
            Step::Dir(dir.clone()),
            Step::Move(other, format!("{dir}/{}", &name[2..])),
        ]);
    }
}
