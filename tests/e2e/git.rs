//! Real git in bare repositories and their clones, and the second namespace, which git doesn't know.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pair::{Ran, run};

pub(crate) fn git(dir: &Path, args: &[&str]) -> Ran {
    run(&mut command(dir, args))
}

/// The command of [`git`], to be started otherwise.
pub(crate) fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(dir).args(args).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").env("LC_ALL", "C");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "Test").env(format!("GIT_{who}_EMAIL"), "test@example.com");
    }
    command
}

#[track_caller]
pub(crate) fn git_ok(dir: &Path, args: &[&str]) -> String {
    git(dir, args).expect_code(0).out
}

/// An empty bare repository as Bitbucket sets it up: no gc by itself.
pub(crate) fn init_bare(at: &Path) {
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    git_ok(Path::new("/"), &["init", "-q", "--bare", "-b", "main", &at.to_string_lossy()]);
    set_up(at);
}

/// The settings of [`init_bare`] in a repository made otherwise.
pub(crate) fn set_up(bare: &Path) {
    let mut config = File::options().append(true).open(bare.join("config")).unwrap();
    config.write_all(b"[gc]\n\tauto = 0\n\tpruneExpire = never\n[receive]\n\tautogc = false\n\tdenyDeleteCurrent = ignore\n").unwrap();
}

pub(crate) fn clone(bare: &Path, at: &Path) {
    git_ok(Path::new("/"), &["clone", "-q", &bare.to_string_lossy(), &at.to_string_lossy()]);
}

/// A commit with one changed file; its id.
pub(crate) fn commit(clone: &Path, file: &str, content: &str) -> String {
    fs::write(clone.join(file), content).unwrap();
    git_ok(clone, &["add", "-A"]);
    git_ok(clone, &["commit", "-q", "-m", file]);
    tip(clone, "HEAD")
}

pub(crate) fn push(clone: &Path, refspecs: &[&str]) {
    let mut args = vec!["push", "-q", "origin"];
    args.extend(refspecs);
    git_ok(clone, &args);
}

#[track_caller]
pub(crate) fn tip(repository: &Path, name: &str) -> String {
    git_ok(repository, &["rev-parse", "--verify", name]).trim().into()
}

#[track_caller]
pub(crate) fn assert_clean(repository: &Path) {
    git_ok(repository, &["fsck", "--full"]);
}

/// All references of both namespaces, with what they name; none if there is no repository.
#[track_caller]
pub(crate) fn references(bare: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    if !bare.join("HEAD").exists() {
        return all;
    }
    for line in git_ok(bare, &["for-each-ref", "--format=%(objectname) %(refname)"]).lines() {
        let (id, name) = line.split_once(' ').unwrap();
        all.insert(name.into(), id.into());
    }
    all.extend(Stash::of(bare).references());
    all
}

/// `stash-refs/` and `stash-packed-refs` of a repository, written as git writes `refs/`.
///
/// One writer a repository.
pub(crate) struct Stash(PathBuf);

impl Stash {
    pub(crate) fn of(bare: &Path) -> Stash {
        Stash(bare.into())
    }

    pub(crate) fn loose(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn packed(&self) -> PathBuf {
        self.0.join("stash-packed-refs")
    }

    /// Creates or changes a reference, such as `stash-refs/pull-requests/1/from`.
    pub(crate) fn write(&self, name: &str, id: &str) {
        let loose = self.loose(name);
        fs::create_dir_all(loose.parent().unwrap()).unwrap();
        replace(&loose, &format!("{id}\n"));
    }

    /// Removes a reference: out of the packed ones, then the loose file.
    pub(crate) fn remove(&self, name: &str) {
        let mut packed = self.packed_references();
        if packed.remove(name).is_some() {
            self.write_packed(&packed);
        }
        self.remove_loose(name);
    }

    /// As `pack-refs --all`: the packed file first, then the loose ones go.
    pub(crate) fn pack(&self) {
        let (mut packed, loose) = (self.packed_references(), self.loose_references());
        packed.extend(loose.clone());
        self.write_packed(&packed);
        loose.keys().for_each(|name| self.remove_loose(name));
    }

    pub(crate) fn references(&self) -> BTreeMap<String, String> {
        let mut all = self.packed_references();
        all.extend(self.loose_references());
        all
    }

    fn loose_references(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for entry in walkdir::WalkDir::new(self.0.join("stash-refs")) {
            let Ok(entry) = entry else { continue };
            let name = entry.path().strip_prefix(&self.0).unwrap().to_string_lossy().into_owned();
            if entry.file_type().is_file() && !name.ends_with(".lock") {
                all.insert(name, fs::read_to_string(entry.path()).unwrap().trim().into());
            }
        }
        all
    }

    fn packed_references(&self) -> BTreeMap<String, String> {
        let text = match fs::read_to_string(self.packed()) {
            Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
            text => text.unwrap(),
        };
        text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split_once(' ')).map(|(id, name)| (name.into(), id.into())).collect()
    }

    fn write_packed(&self, all: &BTreeMap<String, String>) {
        let lines: String = all.iter().map(|(name, id)| format!("{id} {name}\n")).collect();
        replace(&self.packed(), &format!("# pack-refs with: peeled fully-peeled sorted \n{lines}"));
    }

    fn remove_loose(&self, name: &str) {
        match fs::remove_file(self.loose(name)) {
            Err(e) if e.kind() != ErrorKind::NotFound => panic!("{name}: {e}"),
            _ => {}
        }
        // Folders go when they are empty, as git does it.
        for above in Path::new(name).ancestors().skip(1).take_while(|a| a.components().count() > 1) {
            if fs::remove_dir(self.0.join(above)).is_err() {
                break;
            }
        }
    }
}

/// By a lock and a rename.
fn replace(path: &Path, content: &str) {
    let mut lock = path.as_os_str().to_owned();
    lock.push(".lock");
    fs::write(&lock, content).unwrap();
    fs::rename(&lock, path).unwrap();
}

/// A loose object's file.
pub(crate) fn loose_object(bare: &Path, id: &str) -> PathBuf {
    bare.join("objects").join(&id[..2]).join(&id[2..])
}

/// The packs of a repository.
pub(crate) fn packs(bare: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(bare.join("objects/pack")).unwrap().map(|e| e.unwrap().path());
    let mut packs: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == "pack")).collect();
    packs.sort();
    packs
}

/// Locks and temporary files below `root`, outside of coldspare's own folder.
pub(crate) fn leftovers(root: &Path) -> Vec<PathBuf> {
    let walk = walkdir::WalkDir::new(root).into_iter().filter_entry(|e| e.file_name() != ".coldspare");
    let is_left = |name: &str| name.ends_with(".lock") || name.starts_with("tmp_") || name.starts_with("incoming-");
    walk.map(|e| e.unwrap().into_path()).filter(|p| p.file_name().is_some_and(|n| is_left(&n.to_string_lossy()))).collect()
}
