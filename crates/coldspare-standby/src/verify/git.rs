//! Verify, for git: references of both namespaces against the manifest and the objects that they name, alternates, and
//! connectivity, which git itself judges.
//!
//! It runs while changesets are applied: a repository with trouble is looked at a second time, between two changesets,
//! before anything is reported (G7).
//!
//! Invariants: nothing of the standby is changed (G6). git gets no configuration but the repository's own, fetches nothing,
//! runs no hook and takes no lock; the comparison with the manifest comes after it and would name what it wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use coldspare_core::git::family::{Alternate, Repository};
use coldspare_core::git::reference::{PackedRefs, Reference, parse_loose};
use coldspare_core::git::{self, ALTERNATES, ObjectId};
use coldspare_core::{Digest, Problem, ProblemKind, RelPath, key};
use coldspare_os::Disk;
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::Progress;
use crate::error::StandbyError;
use crate::standby::Standby;
use crate::store::{MANIFEST, View};
use crate::tree::Tree;

/// What a look at the repositories found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GitFindings {
    /// Repositories that were looked at.
    pub repositories: u64,
    /// References that they have, in both namespaces.
    pub references: u64,
    /// What is wrong, by path.
    pub problems: Vec<Problem>,
}

/// The git of this host.
#[derive(Debug, Clone)]
pub struct Git {
    version: String,
}

/// LIMIT: bytes of what git says of one repository that are read.
const SAID_BYTES_MAX: u64 = 16 << 10;
/// LIMIT: lines of that which are told.
const SAID_LINES_MAX: usize = 5;

impl Git {
    /// Looks for git on the search path; `None` when there is none that works.
    pub fn find() -> Option<Git> {
        let output = Command::new("git").arg("--version").stdin(Stdio::null()).output().ok().filter(|o| o.status.success())?;
        let text = String::from_utf8_lossy(&output.stdout);
        Some(Git { version: text.trim().trim_start_matches("git version ").to_string() })
    }

    /// Its version, in its own words.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// A command on a repository that reads it and nothing else.
    fn command(&self, repository: &Path) -> Command {
        let mut command = Command::new("git");
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        for (key, value) in [
            ("LC_ALL", "C"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_OPTIONAL_LOCKS", "0"),
            ("GIT_NO_LAZY_FETCH", "1"),
            ("GIT_NO_REPLACE_OBJECTS", "1"),
            ("GIT_TERMINAL_PROMPT", "0"),
        ] {
            command.env(key, value);
        }
        // Over what the repository's own configuration says, which came from the active.
        for setting in ["safe.directory=*", "core.fsmonitor=false", "core.hooksPath=/dev/null", "gc.auto=0", "maintenance.auto=false"] {
            command.args(["-c", setting]);
        }
        command.current_dir("/").arg("--git-dir").arg(repository);
        command
    }

    /// Whether all that the references and `also` reach is there; what git says against it if not.
    fn connectivity(&self, repository: &Path, also: &BTreeSet<ObjectId>) -> std::io::Result<Option<String>> {
        let mut fsck = self.command(repository);
        fsck.args(["fsck", "--connectivity-only", "--no-dangling", "--no-reflogs", "--no-progress"]);
        if let Some(said) = said_against(fsck, &[])? {
            return Ok(Some(format!("git fsck: {said}")));
        }
        if also.is_empty() {
            return Ok(None);
        }
        // What git knows no namespace of. A commit graph would vouch for commits that are not there.
        let tips: String = also.iter().map(|id| format!("{id}\n")).collect();
        let mut walk = self.command(repository);
        walk.args(["-c", "core.commitGraph=false", "rev-list", "--objects", "--quiet", "--stdin", "--not", "--all"]);
        Ok(said_against(walk, tips.as_bytes())?.map(|said| format!("git rev-list: {said}")))
    }
}

/// Runs a command that is to succeed; what it said if it didn't.
fn said_against(mut command: Command, input: &[u8]) -> std::io::Result<Option<String>> {
    let (mut reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::piped()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn()?;
    drop(command); // it holds the pipe's other end
    let stdin = child.stdin.take();
    let mut said = Vec::new();
    std::thread::scope(|scope| {
        // One that ends early doesn't read all of it, and says why.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        let read = reader.by_ref().take(SAID_BYTES_MAX).read_to_end(&mut said);
        drop(reader); // who says more than that is stopped by it
        read
    })?;
    let status = child.wait()?;
    if status.success() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&said);
    let lines: Vec<String> = text
        .lines()
        .filter(|line| !line.is_empty())
        .take(SAID_LINES_MAX)
        .map(|line| coldspare_core::path::escape(line.as_bytes()))
        .collect();
    let how = status.code().map_or("it was killed".to_string(), |code| format!("exit code {code}"));
    Ok(Some(if lines.is_empty() { how } else { format!("{} ({how})", lines.join("; ")) }))
}

/// A look at one repository.
#[derive(Default)]
struct Look {
    references: u64,
    /// What references name, and the path that says so.
    named: BTreeMap<ObjectId, (RelPath, String)>,
    /// What references name that git knows nothing of.
    unknown_to_git: BTreeSet<ObjectId>,
    problems: Vec<Problem>,
}

impl<D: Disk> Standby<D> {
    /// Looks at every repository of the standby, several at once: as many as rayon's pool has threads.
    ///
    /// Cost: one process of git a repository, two where it has pull requests; git reads every commit and tree, no blob.
    ///
    /// # Errors
    /// `Store`, `Damaged`: the manifest itself can't be read; `Io`: git can't be run.
    pub fn verify_git(&self, git: &Git, progress: &Progress) -> Result<GitFindings, StandbyError> {
        let repositories = self.repositories()?;
        progress.begin(repositories.len() as u64);
        let look = |at: &Repository| {
            let look = self.look_at_repository(git, at);
            progress.entries.fetch_add(1, Ordering::Relaxed);
            look
        };
        let looks: Vec<Look> = repositories.par_iter().map(look).collect::<Result<_, _>>()?;
        let mut found = GitFindings { repositories: repositories.len() as u64, ..GitFindings::default() };
        for look in looks {
            found.references += look.references;
            found.problems.extend(look.problems);
        }
        found.problems.sort();
        Ok(found)
    }

    /// The repositories of the manifest, in its order.
    ///
    /// Cost: a pass over the manifest's keys.
    fn repositories(&self) -> Result<Vec<Repository>, StandbyError> {
        let manifest = self.store.view(MANIFEST)?;
        let tree = Tree::now(self, &manifest);
        let mut found = Vec::new();
        manifest.for_each_key(|k| {
            if key::name(k) == b"HEAD" {
                let (root, head) = manifest.path_of(k)?;
                let path = head.parent().unwrap_or_else(RelPath::root);
                if tree.is_repository(root, &path)? {
                    found.push((root, path));
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn look_at_repository(&self, git: &Git, at: &Repository) -> Result<Look, StandbyError> {
        let look = self.examine_repository(git, at)?;
        if look.problems.is_empty() {
            return Ok(look);
        }
        let _between_changesets = self.tree_lock.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.examine_repository(git, at)
    }

    fn examine_repository(&self, git: &Git, at: &Repository) -> Result<Look, StandbyError> {
        let manifest = self.store.view(MANIFEST)?;
        let tree = Tree::now(self, &manifest);
        let mut look = Look::default();
        let (root, repository) = at;
        if !tree.is_repository(*root, repository)? {
            return Ok(look); // it went meanwhile
        }
        let problem = |path: &RelPath, kind, detail: String| Problem { root: *root, path: path.clone(), kind, detail };
        self.look_at_references(&tree, at, &mut look)?;
        let mut lost: BTreeSet<ObjectId> = look.named.keys().copied().collect();
        tree.remove_found(at, &mut lost)?;
        for id in &lost {
            let (path, name) = &look.named[id];
            let detail = format!("{name} names the object {id}, which is neither here nor in what the repository borrows from");
            look.problems.push(problem(path, ProblemKind::Reference, detail));
        }
        self.look_at_alternates(&tree, at, &mut look)?;
        let path = self.root(*root).path.join(OsStr::from_bytes(repository.as_bytes()));
        look.unknown_to_git.retain(|id| !lost.contains(id));
        let said = git.connectivity(&path, &look.unknown_to_git).map_err(crate::error::io("running git on", repository.as_bytes()))?;
        if let Some(said) = said {
            look.problems.push(problem(repository, ProblemKind::Objects, said));
        }
        Ok(look)
    }

    fn look_at_references(&self, tree: &Tree<'_, D>, at: &Repository, look: &mut Look) -> Result<(), StandbyError> {
        let (root, repository) = at;
        let head = repository.join(b"HEAD").ok();
        head.map_or(Ok(()), |head| self.look_at_loose(tree, at, &head, look))?;
        for name in [&b"refs"[..], b"stash-refs"] {
            if let Ok(dir) = repository.join(name) {
                tree.for_each_file_below(*root, &dir, &mut |path| self.look_at_loose(tree, at, path, look))?;
            }
        }
        for name in [&b"packed-refs"[..], b"stash-packed-refs"] {
            let Ok(path) = repository.join(name) else { continue };
            if tree.entry(*root, &path)?.is_some() {
                self.look_at_packed(tree, at, &path, look)?;
            }
        }
        Ok(())
    }

    fn look_at_loose(&self, tree: &Tree<'_, D>, at: &Repository, path: &RelPath, look: &mut Look) -> Result<(), StandbyError> {
        let (root, repository) = at;
        let inside = path.below(repository).unwrap_or_default();
        let mut say = |kind, detail: String| look.problems.push(Problem { root: *root, path: path.clone(), kind, detail });
        if git::never_carried(inside) {
            say(ProblemKind::Leftover, "a lock or a temporary file of git's: the next push would fail".into());
            return Ok(());
        }
        let Some(content) = tree.content(*root, path)? else {
            say(ProblemKind::Reference, "the reference can't be read".into());
            return Ok(());
        };
        if self.is_other(tree, at, path, coldspare_delta::digest(&content))? {
            say(ProblemKind::Content, "the reference is not what the last changeset says".into());
            return Ok(());
        }
        match parse_loose(&content) {
            Err(damage) => say(ProblemKind::Reference, damage.to_string()),
            Ok(Reference::Symbolic(_)) => {}
            Ok(Reference::Object(id)) => look.names(id, path, inside, inside),
        }
        Ok(())
    }

    fn look_at_packed(&self, tree: &Tree<'_, D>, at: &Repository, path: &RelPath, look: &mut Look) -> Result<(), StandbyError> {
        let (root, repository) = at;
        let inside = path.below(repository).unwrap_or_default();
        let mut reader = PackedRefs::default();
        let mut hasher = coldspare_delta::Hasher::new();
        let mut packed = Vec::new();
        let mut damage = None;
        let was_read = tree.read(*root, path, &mut |bytes| {
            hasher.update(bytes);
            if damage.is_none() {
                damage = reader.push(bytes, &mut |name, id| packed.push((name.to_vec(), id))).err();
            }
        })?;
        let damage = damage.or_else(|| reader.finish().err());
        let say = |kind, detail: String| Problem { root: *root, path: path.clone(), kind, detail };
        if !was_read {
            look.problems.push(say(ProblemKind::Reference, "the packed references can't be read".into()));
        } else if self.is_other(tree, at, path, hasher.finish())? {
            look.problems.push(say(ProblemKind::Content, "the packed references are not what the last changeset says".into()));
        } else if let Some(damage) = damage {
            look.problems.push(say(ProblemKind::Reference, damage.to_string()));
        } else {
            for (name, id) in packed {
                let loose = repository.join_path(&name).map_or(Ok(None), |loose| tree.entry(*root, &loose))?;
                // A packed value behind a loose one means nothing: git keeps no objects for it.
                if loose.is_none_or(|entry| entry.is_dir()) {
                    look.names(id, path, &name, inside);
                }
            }
        }
        Ok(())
    }

    /// Whether a file has another digest than the manifest says; a further name of one has none of its own.
    fn is_other(&self, tree: &Tree<'_, D>, at: &Repository, path: &RelPath, digest: [u8; 32]) -> Result<bool, StandbyError> {
        Ok(tree.entry(at.0, path)?.and_then(|entry| entry.digest()).is_some_and(|expected| expected != Digest(digest)))
    }

    fn look_at_alternates(&self, tree: &Tree<'_, D>, at: &Repository, look: &mut Look) -> Result<(), StandbyError> {
        let Ok(path) = at.1.join_path(ALTERNATES) else { return Ok(()) };
        for alternate in tree.alternates(at)? {
            let detail = match alternate {
                Alternate::Replicated((root, lender)) => {
                    let objects = lender.join(b"objects").map_or(Ok(None), |objects| tree.entry(root, &objects))?;
                    if objects.is_some_and(|entry| entry.is_dir()) {
                        continue;
                    }
                    format!("borrows objects from {lender}, which is not on the standby")
                }
                Alternate::Elsewhere => {
                    "borrows objects from outside of the roots, or through a symbolic link: nobody replicates those".into()
                }
            };
            look.problems.push(Problem { root: at.0, path: path.clone(), kind: ProblemKind::Alternate, detail });
        }
        Ok(())
    }
}

impl Look {
    fn names(&mut self, id: ObjectId, path: &RelPath, name: &[u8], inside: &[u8]) {
        self.references += 1;
        if inside.starts_with(b"stash-") {
            self.unknown_to_git.insert(id);
        }
        self.named.entry(id).or_insert_with(|| (path.clone(), coldspare_core::path::escape(name)));
    }
}

impl View {
    /// Calls `each` with every key, in order, without holding them all.
    fn for_each_key(&self, mut each: impl FnMut(&[u8]) -> Result<(), StandbyError>) -> Result<(), StandbyError> {
        self.for_each_raw(|k, _| each(k))
    }
}
