//! What of a home is copied for a rehearsal, and where to.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::survey::{Amount, LARGE_BYTES, Samples};
use crate::demo::home::{git, make_dir, run};
use crate::exit::Failure;

/// LIMIT: files that are copied for the cost of a file.
const SMALL_FILES: usize = 4_000;
/// LIMIT: bytes that are copied for the cost of a byte.
const LARGE_BYTES_MAX: u64 = 192 << 20;
/// LIMIT: bytes of packs of the repository that is repacked.
const REPACK_BYTES_MAX: u64 = 192 << 20;

/// Where a copied file comes from, and its place below the root.
pub(super) type Sample = (PathBuf, PathBuf);

/// Small files, up to the limit.
pub(super) fn pick_small(samples: &Samples) -> Vec<Sample> {
    let picked = samples.small.iter().take(SMALL_FILES).enumerate();
    picked.map(|(n, path)| (path.clone(), place_of(path, n))).collect()
}

/// Large files, packs with what belongs to them, up to the limit; at least one.
pub(super) fn pick_large(samples: &Samples) -> Vec<Sample> {
    let (mut picked, mut bytes, mut repositories) = (Vec::new(), 0, BTreeMap::new());
    for (n, path) in samples.large.iter().enumerate() {
        let size = fs::metadata(path).map_or(0, |meta| meta.len());
        if bytes > 0 && bytes + size > LARGE_BYTES_MAX {
            continue;
        }
        bytes += size.min(LARGE_BYTES_MAX);
        // Of a larger one a part is taken, which is no pack.
        let place = match in_repository(path) {
            // Copies of a repository have packs of the same names: each repository stays one.
            Some((repository, below)) if size <= LARGE_BYTES_MAX => {
                let next = repositories.len();
                let number = *repositories.entry(repository).or_insert(next);
                Path::new("shared/data/repositories").join(format!("large-{number}")).join(below)
            }
            _ => format!("shared/data/parts/{n}").into(),
        };
        picked.push((path.clone(), place));
    }
    picked
}

/// Git's files stay git's, in a repository each thousand; all else becomes an attachment.
fn place_of(path: &Path, n: usize) -> PathBuf {
    match in_repository(path) {
        Some((_, below)) => Path::new(&format!("shared/data/repositories/{}", n / 1_000)).join(below),
        None => PathBuf::from(format!("shared/data/attachments/{}/{n}", n / 100)),
    }
}

/// The repository of a pack or of a loose object, and the path below it.
fn in_repository(path: &Path) -> Option<(&Path, PathBuf)> {
    let names: Vec<&str> = path.iter().rev().take(3).filter_map(|name| name.to_str()).collect();
    match names.as_slice() {
        [name, folder, "objects"] if *folder == "pack" || folder.len() == 2 => {
            Some((path.ancestors().nth(3)?, Path::new("objects").join(folder).join(name)))
        }
        _ => None,
    }
}

/// Copies samples into `home`; how much that was.
///
/// # Errors
/// `Usage`: there is no room for them, or the folder can't be used.
pub(super) fn copy_samples(samples: &[Sample], home: &Path) -> Result<Amount, Failure> {
    let mut amount = Amount::default();
    for (from, to) in samples {
        if let Some(bytes) = copy(from, &home.join(to))? {
            amount = Amount { files: amount.files + 1, bytes: amount.bytes + bytes };
        }
    }
    complete_repositories(home)?;
    Ok(amount)
}

/// The repository that is repacked: the largest within the limit, if there is one, and git.
pub(super) fn fitting_repository(samples: &Samples) -> Option<&Path> {
    let fitting = samples.repositories.iter().filter(|(bytes, _)| (LARGE_BYTES..=REPACK_BYTES_MAX).contains(bytes));
    let (_, found) = fitting.max()?;
    run(std::process::Command::new("git").arg("--version")).is_ok().then_some(found.as_path())
}

/// Copies what of a repository git needs to repack it.
///
/// # Errors
/// As [`copy_samples`].
pub(super) fn copy_repository(from: &Path, to: &Path) -> Result<(), Failure> {
    ["objects", "refs", "HEAD", "packed-refs"].iter().try_for_each(|part| copy_all(&from.join(part), &to.join(part)))
}

/// Has git repack it; bytes of the files that are new then, or `None` when git fails.
pub(super) fn written_by_repack(repository: &Path) -> Option<u64> {
    let packs = repository.join("objects/pack");
    let old = names(&packs);
    // A home in use may have been copied in the middle of something: then nothing is known.
    git(repository, &["repack", "-q", "-ad"]).ok()?;
    let new = names(&packs).into_iter().filter(|path| !old.contains(path));
    Some(new.filter_map(|path| fs::metadata(path).ok()).map(|meta| meta.len()).sum())
}

/// Copies a file, or the beginning of a very large one, and with a pack its index; `None` when the home no longer has it.
fn copy(from: &Path, to: &Path) -> Result<Option<u64>, Failure> {
    make_dir(to.parent().unwrap_or(to))?;
    if from.extension().is_some_and(|end| end == "pack") {
        let _ = fs::copy(from.with_extension("idx"), to.with_extension("idx"));
    }
    let Ok(source) = fs::File::open(from) else { return Ok(None) };
    let fail = |e: std::io::Error| Failure::usage(format!("{}: {e}; --scratch names another place", to.display()));
    let mut target = fs::File::create(to).map_err(fail)?;
    match std::io::copy(&mut source.take(LARGE_BYTES_MAX), &mut target) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::StorageFull => Err(fail(e)),
        Err(_) => Ok(None),
    }
}

/// Makes repositories of folders that have objects only.
fn complete_repositories(home: &Path) -> Result<(), Failure> {
    let Ok(entries) = fs::read_dir(home.join("shared/data/repositories")) else { return Ok(()) };
    for repository in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        make_dir(&repository.join("refs/heads"))?;
        let head = repository.join("HEAD");
        fs::write(&head, "ref: refs/heads/main\n").map_err(|e| Failure::usage(format!("{}: {e}", head.display())))?;
    }
    Ok(())
}

pub(super) fn names(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.filter_map(Result::ok).map(|entry| entry.path()).collect()).unwrap_or_default()
}

fn copy_all(from: &Path, to: &Path) -> Result<(), Failure> {
    if !from.is_dir() {
        return copy(from, to).map(drop);
    }
    make_dir(to)?;
    names(from).iter().try_for_each(|path| copy_all(path, &to.join(path.file_name().unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_of_equal_names_stay_in_repositories_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let (home, copied) = (dir.path().join("home"), dir.path().join("copied"));
        let mut samples = Samples::default();
        for (repository, byte) in [("1", 1u8), ("2", 2)] {
            let packs = home.join(repository).join("objects/pack");
            make_dir(&packs).unwrap();
            for name in ["pack-a", "pack-b"] {
                fs::write(packs.join(name).with_extension("pack"), vec![byte; LARGE_BYTES as usize]).unwrap();
                fs::write(packs.join(name).with_extension("idx"), [byte]).unwrap();
                samples.large.push(packs.join(name).with_extension("pack"));
            }
        }
        // As the survey finds them: not one repository after the other.
        samples.large.swap(1, 2);
        assert_eq!(copy_samples(&pick_large(&samples), &copied).unwrap(), Amount { files: 4, bytes: 4 * LARGE_BYTES });
        let mut found = Vec::new();
        for repository in names(&copied.join("shared/data/repositories")) {
            let mut bytes: Vec<u8> = names(&repository.join("objects/pack")).iter().map(|path| fs::read(path).unwrap()[0]).collect();
            bytes.dedup();
            assert!(repository.join("HEAD").exists() && names(&repository.join("objects/pack")).len() == 4);
            found.extend(bytes);
        }
        found.sort_unstable();
        assert_eq!(found, [1, 2], "a repository has the packs of both");
    }
}
