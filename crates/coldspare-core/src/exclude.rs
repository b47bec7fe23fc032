//! What of a root is not replicated: the built-in profile and the configuration's changes to it.
//!
//! A pattern is anchored at the root, `*` and `?` stay within one component, `**` crosses them; a trailing `/`
//! makes it match directories only. What matches is left out with all below it.
//!
//! Invariants: the root itself is never excluded.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use globset::{Candidate, GlobBuilder, GlobSet, GlobSetBuilder};

use crate::path::RelPath;

/// The exclude list for a Bitbucket home: what the application rebuilds, or what is unsafe to copy live.
///
/// Source: the vendor's own exclude list for copies of a live home.
pub const BITBUCKET: &[&str] = &[
    ".lock",
    "shared/.lock",
    "caches/",
    "data/db.*",
    "export/",
    "log/",
    "plugins/.*/",
    "search/data/",
    "shared/data/db.*",
    "shared/export/",
    "shared/plugins/.*/",
    "shared/search/data/",
    "tmp/",
];

/// A compiled exclude list.
#[derive(Debug, Clone)]
pub struct Exclude {
    any: GlobSet,
    dirs: GlobSet,
    is_empty: bool,
}

/// A pattern that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("exclude pattern {pattern:?}: {reason}")]
pub struct PatternError {
    /// As it stands in the configuration.
    pub pattern: String,
    /// What is wrong.
    pub reason: String,
}

/// Whether a path is a directory, for patterns that match only those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IsDir {
    /// It is.
    Yes,
    /// It isn't.
    No,
}

impl Exclude {
    /// Compiles `patterns`.
    ///
    /// # Errors
    /// [`PatternError`]: empty, starting with `/`, or not a glob.
    pub fn new<S: AsRef<str>>(patterns: impl IntoIterator<Item = S>) -> Result<Exclude, PatternError> {
        let mut any = GlobSetBuilder::new();
        let mut dirs = GlobSetBuilder::new();
        let mut is_empty = true;
        for pattern in patterns {
            let pattern = pattern.as_ref();
            let fail = |reason: &str| PatternError { pattern: pattern.into(), reason: reason.into() };
            let bare = pattern.strip_suffix('/').unwrap_or(pattern);
            if bare.is_empty() {
                return Err(fail("is empty; it would leave out the whole root"));
            }
            if bare.starts_with('/') {
                return Err(fail("patterns are relative to the root; remove the leading '/'"));
            }
            let glob =
                GlobBuilder::new(bare).literal_separator(true).backslash_escape(true).build().map_err(|e| fail(&e.kind().to_string()))?;
            if pattern.ends_with('/') { &mut dirs } else { &mut any }.add(glob);
            is_empty = false;
        }
        let build = |b: GlobSetBuilder| b.build().map_err(|e| PatternError { pattern: String::new(), reason: e.to_string() });
        Ok(Exclude { any: build(any)?, dirs: build(dirs)?, is_empty })
    }

    /// Whether `path` itself matches; what is below an excluded directory has to be asked about through its ancestors.
    pub fn matches(&self, path: &RelPath, is_dir: IsDir) -> bool {
        if self.is_empty || path.is_root() {
            return false;
        }
        let candidate = Candidate::new(OsStr::from_bytes(path.as_bytes()));
        self.any.is_match_candidate(&candidate) || (is_dir == IsDir::Yes && self.dirs.is_match_candidate(&candidate))
    }

    /// Whether `path` or any directory above it matches.
    pub fn covers(&self, path: &RelPath, is_dir: IsDir) -> bool {
        !self.is_empty && (path.ancestors().any(|a| self.matches(&a, IsDir::Yes)) || self.matches(path, is_dir))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(patterns: &[&str], path: &str, is_dir: IsDir, expected: bool) {
        let exclude = Exclude::new(patterns).unwrap();
        assert_eq!(exclude.covers(&RelPath::new(path.as_bytes()).unwrap(), is_dir), expected, "{path}");
    }

    #[test]
    fn the_bitbucket_profile_leaves_out_caches_and_locks_only() {
        for (path, is_dir, expected) in [
            ("caches", IsDir::Yes, true),
            ("caches/a/b", IsDir::No, true),
            ("log/atlassian-bitbucket.log", IsDir::No, true),
            ("plugins/.osgi-plugins/x.jar", IsDir::No, true),
            ("shared/plugins/.cache/x", IsDir::No, true),
            ("shared/plugins/installed-plugins/x.jar", IsDir::No, false),
            ("shared/data/db.mv.db", IsDir::No, true),
            ("shared/data/repositories/1/HEAD", IsDir::No, false),
            ("shared/data/repositories/1/refs/heads/log", IsDir::No, false),
            (".lock", IsDir::No, true),
            ("shared/.lock", IsDir::No, true),
            ("shared/data/.lock", IsDir::No, false),
            ("tmp", IsDir::No, false),
            ("shared/search/data/nodes", IsDir::Yes, true),
            ("shared/config/log", IsDir::Yes, false),
        ] {
            check(BITBUCKET, path, is_dir, expected);
        }
    }

    #[test]
    fn patterns_are_anchored_globs() {
        check(&["*.bak"], "a.bak", IsDir::No, true);
        check(&["*.bak"], "d/a.bak", IsDir::No, false);
        check(&["**/*.bak"], "d/e/a.bak", IsDir::No, true);
        check(&["d/"], "d", IsDir::No, false);
        check(&[], "anything", IsDir::No, false);
        assert!(Exclude::new(["/abs"]).is_err());
        assert!(Exclude::new(["/"]).is_err());
        assert!(Exclude::new(["a[", "b"]).is_err());
    }
}
