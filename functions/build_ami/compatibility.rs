//! Which Hail goes with which EMR release, and which VEP releases there are.
//!
//! The table is `packer/compatibility.json`, which the Packer build and the documentation read too.

use serde::Deserialize;
use std::collections::BTreeMap;

const TABLE: &str = include_str!("../../packer/compatibility.json");

/// What [`Combination::vep`] says where VEP is not asked for.
pub const NO_VEP: &str = "none";

/// Versions that shall go into one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Combination<'a> {
    /// A release on PyPI (`0.2.139`); anything that is not three numbers is a git ref, built from source.
    pub hail: &'a str,
    /// A release of Ensembl, or [`NO_VEP`].
    pub vep: &'a str,
    /// A release label of EMR.
    pub emr: &'a str,
}

#[derive(Deserialize)]
struct Table {
    emr_releases: BTreeMap<String, Release>,
    vep: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Release {
    hail: Vec<String>,
}

impl Combination<'_> {
    /// Refuses a combination that is not known to work, with the nearest one that is.
    pub fn check(&self) -> Result<(), String> {
        let table: Table = serde_json::from_str(TABLE).map_err(|why| format!("compatibility.json: {why}"))?;
        let Some(nearest) = table.nearest(self) else { return Err("compatibility.json is empty".into()) };
        let (property, given) = if nearest.emr != self.emr {
            ("EmrReleaseLabel", self.emr)
        } else if nearest.hail != self.hail {
            ("HailVersion", self.hail)
        } else if nearest.vep != self.vep {
            ("VepVersion", self.vep)
        } else {
            return Ok(());
        };
        let Combination { hail, vep, emr } = nearest;
        let what = if property == "HailVersion" && !is_release(given) {
            "a source that is built at one's own risk"
        } else {
            "not known to work here"
        };
        Err(format!(
            "property {property}: \"{given}\" is {what}; the nearest versions that work together are HailVersion {hail}, \
             EmrReleaseLabel {emr}, VepVersion {vep}. AllowUntestedVersions=true builds what was asked for all the same"
        ))
    }
}

impl Table {
    fn nearest<'a>(&'a self, asked: &'a Combination) -> Option<Combination<'a>> {
        let emr = nearest(self.emr_releases.keys(), asked.emr)?;
        let hail = nearest(&self.emr_releases[emr].hail, asked.hail)?;
        let vep = if asked.vep == NO_VEP { NO_VEP } else { nearest(self.vep.keys(), asked.vep)? };
        Some(Combination { hail, vep, emr })
    }
}

/// Whether it is a release of Hail on PyPI and not a git ref.
pub fn is_release(hail: &str) -> bool {
    numbers(hail).len() == 3 && hail.chars().all(|character| character.is_ascii_digit() || character == '.')
}

/// The newest version that is not newer than what was asked for; where all are newer, the oldest. What has no numbers
/// (a branch) is newer than all.
fn nearest<'a>(known: impl IntoIterator<Item = &'a String>, asked: &str) -> Option<&'a str> {
    let mut known: Vec<&str> = known.into_iter().map(String::as_str).collect();
    known.sort_by_key(|version| numbers(version));
    let wanted = numbers(asked);
    let not_newer = |version: &&&str| wanted.is_empty() || numbers(version) <= wanted;
    known.iter().rev().find(not_newer).or(known.first()).copied()
}

/// The numbers in a version: 7, 13 and 0 of `emr-7.13.0`. None where it holds a number that is too large to be one.
fn numbers(version: &str) -> Vec<u64> {
    let groups = version.split(|character: char| !character.is_ascii_digit()).filter(|group| !group.is_empty());
    groups.map(str::parse).collect::<Result<_, _>>().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKS: Combination = Combination { hail: "0.2.139", vep: NO_VEP, emr: "emr-7.13.0" };

    #[test]
    fn versions_that_work_together_are_taken() {
        assert_eq!(WORKS.check(), Ok(()));
        assert_eq!(Combination { vep: "115", ..WORKS }.check(), Ok(()));
    }

    #[test]
    fn versions_that_do_not_are_refused_with_the_nearest_that_do() {
        for (asked, property, nearest) in [
            (Combination { hail: "0.2.9", ..WORKS }, "HailVersion: \"0.2.9\"", "HailVersion 0.2.131,"),
            (Combination { hail: "0.2.200", ..WORKS }, "HailVersion: \"0.2.200\"", "HailVersion 0.2.139,"),
            (Combination { hail: "1.0.0", ..WORKS }, "HailVersion: \"1.0.0\"", "HailVersion 0.2.139,"),
            (Combination { hail: "main", ..WORKS }, "HailVersion: \"main\" is a source", "HailVersion 0.2.139,"),
            (Combination { emr: "emr-5.1.0", ..WORKS }, "EmrReleaseLabel: \"emr-5.1.0\"", "EmrReleaseLabel emr-7."),
            (Combination { hail: "0.2.135.1", ..WORKS }, "HailVersion: \"0.2.135.1\"", "HailVersion 0.2.135,"),
            (Combination { emr: "emr-8.1.0", ..WORKS }, "EmrReleaseLabel: \"emr-8.1.0\"", "emr-7.13.0"),
            (Combination { vep: "12", ..WORKS }, "VepVersion: \"12\"", "VepVersion 105."),
            (Combination { vep: "116", ..WORKS }, "VepVersion: \"116\"", "VepVersion 115."),
            (Combination { hail: "0.2.99999999999999999999", ..WORKS }, "HailVersion:", "HailVersion 0.2.139,"),
        ] {
            let why = asked.check().unwrap_err();
            assert!(why.starts_with(&format!("property {property}")) && why.contains(nearest), "{why}");
            assert!(why.contains("AllowUntestedVersions=true"));
        }
    }

    #[test]
    fn three_numbers_are_a_release_and_everything_else_a_git_ref() {
        assert!(is_release("0.2.139"));
        for git_ref in ["main", "0.2", "0.2.139-rc1", "v0.2.139", "0123456789abcdef0123456789abcdef01234567", "1.2.3.4"]
        {
            assert!(!is_release(git_ref), "{git_ref}");
        }
    }
}
