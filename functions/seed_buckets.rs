//! `Custom::BucketSeed` in hail-s3: puts the shared notebooks and scripts, the VEP configuration and the Packer build
//! into the buckets.
//!
//! | | |
//! |---|---|
//! | properties | `HailBucket`, `NotebookBucket`; `LogBucket`, which has to be there and gets nothing; `AssetsDigest`, which changes when the assets do |
//! | Data | `AssetsDigest`; `NotebookDigest`, which changes when what goes to the notebook bucket does; `Uploaded`, `Unchanged`, `Removed` (counts); `Kept` (objects that people changed, or `nothing`); `PackerZip` (key) |
//! | Create, Update | make the buckets hold what is shipped |
//! | Delete | removes what it put and nothing else |
//! | replacement | never; a bucket that is exchanged for another keeps what was put into it |
//!
//! The assets ride in the function's own package, so that a launch from the console needs no source bucket:
//!
//! | in the package | in the buckets |
//! |---|---|
//! | `assets/common-notebooks/` | notebook bucket, `common-notebooks/` |
//! | `assets/scripts/` | notebook bucket, `scripts/` |
//! | `assets/vep/` | Hail bucket, `vep/` |
//! | `assets/packer/` | Hail bucket, `packer/packer.zip`: one zip, the same bytes for the same files |
//!
//! A manifest at `seeds/<physical id>.json` in the Hail bucket says what was put there: the content's SHA-256 and the
//! ETag that S3 gave. An object whose ETag has changed since is a person's work and is left alone, whatever happens:
//! Data names it. So is one that was there before. An object that a person deleted comes back. Where the manifest
//! knows nothing of an object, its metadata tells whether this resource put it.

use crate::custom_resource::{Answer, Provider, Resource, hex_digest, read_properties};
use crate::failure::Failure;
use aws_config::SdkConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, Delete, ObjectIdentifier};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Cursor, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tracing::info;
use zip::write::SimpleFileOptions;

/// Requests under way at once. Measured: with 20 ms a request more than 32 bring nothing.
const CONCURRENCY: usize = 32;

/// Objects that one DeleteObjects takes (AWS: DeleteObjects).
const DELETE_AT_ONCE: usize = 1000;

/// The metadata by which an object says that a resource put it, should the manifest not know: a [`mark`].
const OWNER: &str = "hail-seed";

/// The metadata with the SHA-256 of what was put.
const CONTENT: &str = "hail-seed-sha256";

/// How S3 says that there is no such bucket.
const BUCKET_IS_GONE: &str = "NoSuchBucket";

const PACKER_ZIP: &str = "packer/packer.zip";

/// See the module.
pub struct SeedBuckets {
    s3: Client,
    assets: PathBuf,
}

/// What the template says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Properties {
    hail_bucket: String,
    log_bucket: String,
    notebook_bucket: String,
    assets_digest: String,
}

/// What `Fn::GetAtt` gives.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Data {
    assets_digest: String,
    notebook_digest: String,
    uploaded: String,
    unchanged: String,
    removed: String,
    kept: String,
    packer_zip: &'static str,
}

/// One of the two buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Bucket {
    Hail,
    Notebook,
}

/// What it means that a bucket is gone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IfGone {
    Fail,
    IsEmpty,
}

/// Where an object is.
type Place = (Bucket, String);

/// What is shipped for one object.
struct Asset {
    content: Content,
    sha256: [u8; 32],
}

enum Content {
    File(PathBuf),
    Bytes(Vec<u8>),
}

/// What was put, by place.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    hail: BTreeMap<String, Put>,
    notebook: BTreeMap<String, Put>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Put {
    sha256: String,
    etag: String,
}

impl Manifest {
    fn of(&self, bucket: Bucket) -> &BTreeMap<String, Put> {
        match bucket {
            Bucket::Hail => &self.hail,
            Bucket::Notebook => &self.notebook,
        }
    }

    fn of_mut(&mut self, bucket: Bucket) -> &mut BTreeMap<String, Put> {
        match bucket {
            Bucket::Hail => &mut self.hail,
            Bucket::Notebook => &mut self.notebook,
        }
    }

    fn places(&self) -> impl Iterator<Item = (Place, &Put)> {
        let hail = self.hail.iter().map(|(key, put)| ((Bucket::Hail, key.clone()), put));
        hail.chain(self.notebook.iter().map(|(key, put)| ((Bucket::Notebook, key.clone()), put)))
    }
}

/// What is to be done about one object.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It is there as shipped.
    Leave,
    /// It is not there.
    PutNew,
    /// It is there as it was put, and something else is shipped now.
    Replace { etag: String },
    /// It is there and no manifest knows it: only its metadata tells whose it is.
    AskWhose,
    /// A person changed it.
    Keep,
    /// It is there as it was put, and is not shipped any more.
    Remove,
    /// It is not shipped any more, and gone.
    Forget,
}

/// The decision, for every combination of what is shipped (its SHA-256), what was put, and what is there (its ETag).
fn step(shipped: Option<&str>, put: Option<&Put>, there: Option<&str>) -> Step {
    match (shipped, put, there) {
        (Some(_), _, None) => Step::PutNew,
        (Some(sha256), Some(put), Some(etag)) if put.etag == etag => {
            if put.sha256 == sha256 {
                Step::Leave
            } else {
                Step::Replace { etag: etag.into() }
            }
        }
        (Some(_), Some(_), Some(_)) => Step::Keep,
        (Some(_), None, Some(_)) => Step::AskWhose,
        (None, Some(put), Some(etag)) if put.etag == etag => Step::Remove,
        (None, Some(_), Some(_)) => Step::Keep,
        (None, _, _) => Step::Forget,
    }
}

/// What became of one object.
enum Done {
    Uploaded(Place, Put),
    Unchanged(Place, Put),
    Kept(Place),
}

impl SeedBuckets {
    /// With the function's own credentials, and the assets of its package.
    pub fn connect(aws: &SdkConfig) -> Self {
        let package = std::env::var("LAMBDA_TASK_ROOT").unwrap_or_else(|_| ".".into());
        Self { s3: Client::new(aws), assets: Path::new(&package).join("assets") }
    }

    async fn seed(&self, resource: &Resource, properties: &Properties) -> Result<Data, Failure> {
        let buckets = Buckets(properties);
        let owner = resource.physical_id.as_str();
        let assets = self.assets().map_err(|why| {
            Failure::new(format!(
                "reading the assets of the function's package in {} failed: {why}; build and package it again",
                self.assets.display()
            ))
        })?;
        self.find_buckets(properties).await?;
        let manifest = self.read_manifest(&buckets, owner).await?;
        let there = self.list(&buckets, IfGone::Fail).await?;

        let (mut removals, mut kept, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        for (place, put) in manifest.places().filter(|(place, _)| !assets.contains_key(place)) {
            match step(None, Some(put), there.get(&place).map(String::as_str)) {
                Step::Remove => removals.push(place),
                Step::Keep => kept.push(place),
                _ => {}
            }
        }
        for (place, asset) in &assets {
            let put = manifest.of(place.0).get(&place.1);
            steps.push((place, asset, step(Some(&hex(&asset.sha256)), put, there.get(place).map(String::as_str)), put));
        }

        // What has been put so far is written down even if the rest fails, so that it is known to be ours.
        let mut now = Manifest::default();
        let mut uploaded = 0;
        let mut unchanged = 0;
        let mut first_failure = None;
        let mut work = stream::iter(steps)
            .map(|(place, asset, step, put)| self.carry_out(&buckets, owner, place, asset, step, put))
            .buffer_unordered(CONCURRENCY);
        while let Some(done) = work.next().await {
            match done {
                Ok(Done::Uploaded(place, put)) => {
                    uploaded += 1;
                    now.of_mut(place.0).insert(place.1, put);
                }
                Ok(Done::Unchanged(place, put)) => {
                    unchanged += 1;
                    now.of_mut(place.0).insert(place.1, put);
                }
                Ok(Done::Kept(place)) => kept.push(place),
                Err(failure) => first_failure = first_failure.or(Some(failure)),
            }
        }
        drop(work);
        if first_failure.is_none() {
            first_failure = self.remove(&buckets, &removals).await.err();
        }
        // A person's object stays in the manifest as it was put: if it is put back, it is ours again.
        let forgotten =
            |place: &Place| first_failure.is_none() && (removals.contains(place) || !there.contains_key(place));
        for (place, put) in manifest.places() {
            if !now.of(place.0).contains_key(&place.1) && !forgotten(&place) {
                now.of_mut(place.0).insert(place.1, put.clone());
            }
        }
        if now != manifest {
            self.write_manifest(&buckets, owner, &now).await?;
        }
        if let Some(failure) = first_failure {
            return Err(failure);
        }
        info!(uploaded, unchanged, removed = removals.len(), kept = kept.len(), "seeded");
        Ok(Data {
            assets_digest: properties.assets_digest.clone(),
            notebook_digest: digest_of(Bucket::Notebook, &assets),
            uploaded: uploaded.to_string(),
            unchanged: unchanged.to_string(),
            removed: removals.len().to_string(),
            kept: name_some(&buckets, kept),
            packer_zip: PACKER_ZIP,
        })
    }

    /// Buckets that were there before may be misspelt, somebody else's or in another region; the logs' would miss them
    /// without a word.
    async fn find_buckets(&self, properties: &Properties) -> Result<(), Failure> {
        for bucket in [&properties.hail_bucket, &properties.log_bucket, &properties.notebook_bucket] {
            let found = self.s3.list_objects_v2().bucket(bucket).max_keys(1).send().await;
            found.map_err(|error| {
                let failure = Failure::aws(format!("looking for bucket {bucket}"), error);
                let hint = "the stack uses a bucket of this account and region, or creates it itself";
                Failure { reason: format!("{}; {hint}", failure.reason), ..failure }
            })?;
        }
        Ok(())
    }

    async fn carry_out(
        &self,
        buckets: &Buckets<'_>,
        owner: &str,
        place: &Place,
        asset: &Asset,
        step: Step,
        put: Option<&Put>,
    ) -> Result<Done, Failure> {
        let unchanged = |etag: String| Done::Unchanged(place.clone(), Put { sha256: hex(&asset.sha256), etag });
        let only_if = match step {
            Step::PutNew => None,
            Step::Replace { etag } => Some(etag),
            Step::AskWhose => match self.ours(buckets, owner, place).await? {
                Some(put) if put.sha256 == hex(&asset.sha256) => return Ok(unchanged(put.etag)),
                Some(put) => Some(put.etag),
                None => return Ok(Done::Kept(place.clone())),
            },
            Step::Leave => return Ok(unchanged(put.map(|put| put.etag.clone()).unwrap_or_default())),
            Step::Keep | Step::Remove | Step::Forget => return Ok(Done::Kept(place.clone())),
        };
        let key = &place.1;
        let doing = || format!("uploading s3://{}/{key}", buckets.name(place.0));
        let body = match &asset.content {
            Content::File(path) => ByteStream::from_path(path)
                .await
                .map_err(|why| Failure::new(format!("{} failed: {} cannot be read: {why}", doing(), path.display())))?,
            Content::Bytes(bytes) => ByteStream::from(bytes.clone()),
        };
        let request = self
            .s3
            .put_object()
            .bucket(buckets.name(place.0))
            .key(key)
            .body(body)
            // S3 compares and refuses what arrived otherwise.
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .checksum_sha256(BASE64_STANDARD.encode(asset.sha256))
            .content_type(content_type(key))
            .metadata(OWNER, mark(owner, key))
            .metadata(CONTENT, hex(&asset.sha256));
        // Nobody's change of the last second is overwritten either.
        let request = match &only_if {
            Some(etag) => request.if_match(etag),
            None => request.if_none_match("*"),
        };
        match request.send().await.map_err(|error| Failure::aws(doing(), error)) {
            Ok(answer) => {
                let put = Put { sha256: hex(&asset.sha256), etag: answer.e_tag.unwrap_or_default() };
                Ok(Done::Uploaded(place.clone(), put))
            }
            // Another delivery of this request may have been faster, or a person.
            Err(failure) if failure.is(&["PreconditionFailed", "ConditionalRequestConflict"]) => {
                match self.ours(buckets, owner, place).await? {
                    Some(put) if put.sha256 == hex(&asset.sha256) => Ok(unchanged(put.etag)),
                    _ if failure.is(&["PreconditionFailed"]) => Ok(Done::Kept(place.clone())),
                    _ => Err(failure),
                }
            }
            Err(failure) => Err(failure),
        }
    }

    /// What this resource put there, if what is there says that it did.
    async fn ours(&self, buckets: &Buckets<'_>, owner: &str, (bucket, key): &Place) -> Result<Option<Put>, Failure> {
        let bucket = buckets.name(*bucket);
        let head = self.s3.head_object().bucket(bucket).key(key).send().await;
        let head = match head.map_err(|error| Failure::aws(format!("looking at s3://{bucket}/{key}"), error)) {
            Err(failure) if failure.is(&["NotFound", "NoSuchKey"]) => return Ok(None),
            head => head?,
        };
        let metadata = head.metadata.unwrap_or_default();
        let is_ours = metadata.get(OWNER) == Some(&mark(owner, key));
        let put = metadata.get(CONTENT).cloned().zip(head.e_tag).map(|(sha256, etag)| Put { sha256, etag });
        Ok(put.filter(|_| is_ours))
    }

    /// The ETags of what is there, under the prefixes that this resource writes to.
    async fn list(&self, buckets: &Buckets<'_>, if_gone: IfGone) -> Result<BTreeMap<Place, String>, Failure> {
        const PREFIXES: [(Bucket, &str); 4] = [
            (Bucket::Notebook, "common-notebooks/"),
            (Bucket::Notebook, "scripts/"),
            (Bucket::Hail, "vep/"),
            (Bucket::Hail, PACKER_ZIP),
        ];
        let lists = stream::iter(PREFIXES).map(|(bucket, prefix)| async move {
            let name = buckets.name(bucket);
            let mut pages = self.s3.list_objects_v2().bucket(name).prefix(prefix).into_paginator().send();
            let mut found = Vec::new();
            while let Some(page) = pages.next().await {
                let page = match page.map_err(|error| Failure::aws(format!("listing s3://{name}/{prefix}"), error)) {
                    Err(failure) if if_gone == IfGone::IsEmpty && failure.is(&[BUCKET_IS_GONE]) => break,
                    page => page?,
                };
                // A prefix that is no folder is a key, and no more is the function allowed to look at.
                let is_in = |key: &str| prefix.ends_with('/') || key == prefix;
                let objects = page.contents.unwrap_or_default().into_iter();
                let objects = objects.filter_map(|object| Some(((bucket, object.key?), object.e_tag?)));
                found.extend(objects.filter(|((_, key), _)| is_in(key)));
            }
            Ok(found)
        });
        let lists: Vec<_> = lists.buffer_unordered(PREFIXES.len()).try_collect().await?;
        Ok(lists.into_iter().flatten().collect())
    }

    async fn remove(&self, buckets: &Buckets<'_>, places: &[Place]) -> Result<(), Failure> {
        for bucket in [Bucket::Hail, Bucket::Notebook] {
            let keys: Vec<_> = places.iter().filter(|place| place.0 == bucket).map(|place| &place.1).collect();
            for keys in keys.chunks(DELETE_AT_ONCE) {
                self.delete_objects(buckets.name(bucket), keys).await?;
            }
        }
        Ok(())
    }

    async fn delete_objects(&self, bucket: &str, keys: &[&String]) -> Result<(), Failure> {
        let doing = || format!("removing {} objects of bucket {bucket}", keys.len());
        let defect = |why: &dyn std::fmt::Display| Failure::new(format!("{} failed: {why}", doing()));
        let objects: Result<Vec<_>, _> = keys.iter().map(|key| ObjectIdentifier::builder().key(*key).build()).collect();
        let delete = Delete::builder()
            .set_objects(Some(objects.map_err(|why| defect(&why))?))
            .quiet(true)
            .build()
            .map_err(|why| defect(&why))?;
        let answer = self.s3.delete_objects().bucket(bucket).delete(delete).send().await;
        let errors = answer.map_err(|error| Failure::aws(doing(), error))?.errors.unwrap_or_default();
        match errors.first() {
            None => Ok(()),
            Some(error) => Err(Failure::new(format!(
                "{} failed for {} of them, first for {}: {}: {}",
                doing(),
                errors.len(),
                error.key().unwrap_or_default(),
                error.code().unwrap_or_default(),
                error.message().unwrap_or_default()
            ))),
        }
    }

    async fn read_manifest(&self, buckets: &Buckets<'_>, owner: &str) -> Result<Manifest, Failure> {
        let bucket = buckets.name(Bucket::Hail);
        let key = manifest_key(owner);
        let doing = || format!("reading the manifest s3://{bucket}/{key}");
        let object = self.s3.get_object().bucket(bucket).key(&key).send().await;
        let object = match object.map_err(|error| Failure::aws(doing(), error)) {
            Err(failure) if failure.is(&["NoSuchKey"]) => return Ok(Manifest::default()),
            object => object?,
        };
        let bytes = object.body.collect().await;
        let bytes = bytes.map_err(|why| Failure::new(format!("{} failed: {why}", doing())))?.into_bytes();
        serde_json::from_slice(&bytes).map_err(|why| {
            Failure::new(format!(
                "{} failed: it is not what this function wrote: {why}. Restore its previous version, or delete it: \
                 the objects' metadata tell as much",
                doing()
            ))
        })
    }

    async fn write_manifest(&self, buckets: &Buckets<'_>, owner: &str, manifest: &Manifest) -> Result<(), Failure> {
        let bucket = buckets.name(Bucket::Hail);
        let key = manifest_key(owner);
        let doing = || format!("writing the manifest s3://{bucket}/{key}");
        let body = serde_json::to_vec(manifest).map_err(|why| Failure::new(format!("{} failed: {why}", doing())))?;
        let put = self
            .s3
            .put_object()
            .bucket(bucket)
            .key(&key)
            .content_type("application/json")
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .checksum_sha256(BASE64_STANDARD.encode(Sha256::digest(&body)))
            .body(body.into());
        put.send().await.map(|_| ()).map_err(|error| Failure::aws(doing(), error))
    }

    /// What is shipped, by place.
    fn assets(&self) -> io::Result<BTreeMap<Place, Asset>> {
        let mut assets = BTreeMap::new();
        for (bucket, folder) in
            [(Bucket::Notebook, "common-notebooks"), (Bucket::Notebook, "scripts"), (Bucket::Hail, "vep")]
        {
            for path in files_below(&self.assets.join(folder))? {
                let key = key_of(&self.assets, &path)?;
                let sha256 = Sha256::digest(fs::read(&path)?).into();
                assets.insert((bucket, key), Asset { content: Content::File(path), sha256 });
            }
        }
        let zip = zip_folder(&self.assets.join("packer"))?;
        let sha256 = Sha256::digest(&zip).into();
        assets.insert((Bucket::Hail, PACKER_ZIP.into()), Asset { content: Content::Bytes(zip), sha256 });
        Ok(assets)
    }
}

impl Provider for SeedBuckets {
    type Properties = Properties;
    type Data = Data;
    type Awaited = ();

    fn read(&self, _: &str, properties: Value) -> Result<Properties, String> {
        read_properties(properties)
    }

    async fn create(&self, resource: &Resource, new: Properties) -> Result<Answer<Self>, Failure> {
        self.seed(resource, &new).await.map(Answer::Now)
    }

    async fn update(
        &self,
        resource: &Resource,
        new: Properties,
        _: Option<Properties>,
    ) -> Result<Answer<Self>, Failure> {
        self.seed(resource, &new).await.map(Answer::Now)
    }

    async fn delete(&self, resource: &Resource, old: Properties) -> Result<(), Failure> {
        let buckets = Buckets(&old);
        let owner = resource.physical_id.as_str();
        let manifest = match self.read_manifest(&buckets, owner).await {
            Err(failure) if failure.is(&[BUCKET_IS_GONE]) => Manifest::default(),
            manifest => manifest?,
        };
        let there = self.list(&buckets, IfGone::IsEmpty).await?;
        let mut ours = Vec::new();
        for (place, put) in manifest.places() {
            if step(None, Some(put), there.get(&place).map(String::as_str)) == Step::Remove {
                ours.push(place);
            }
        }
        // A Create that was cut off wrote no manifest, and the bucket with the manifest may be gone: what was put says
        // so itself.
        let unknown = there.into_keys().filter(|place| !manifest.of(place.0).contains_key(&place.1));
        let buckets = &buckets;
        let asked = stream::iter(unknown).map(|place| async move {
            let put = self.ours(buckets, owner, &place).await?;
            Ok(put.map(|_| place))
        });
        let found: Vec<Option<Place>> = asked.buffer_unordered(CONCURRENCY).try_collect().await?;
        ours.extend(found.into_iter().flatten());
        self.remove(buckets, &ours).await?;
        match self.delete_objects(buckets.name(Bucket::Hail), &[&manifest_key(owner)]).await {
            Err(failure) if failure.is(&[BUCKET_IS_GONE]) => Ok(()),
            removed => removed,
        }
    }
}

/// The two buckets' names.
struct Buckets<'a>(&'a Properties);

impl Buckets<'_> {
    fn name(&self, bucket: Bucket) -> &str {
        match bucket {
            Bucket::Hail => &self.0.hail_bucket,
            Bucket::Notebook => &self.0.notebook_bucket,
        }
    }
}

/// What an object of this resource has in its metadata. The key is in it, since a copy of the object, which is a
/// person's, has the same metadata.
fn mark(owner: &str, key: &str) -> String {
    hex_digest([owner, key])
}

fn manifest_key(owner: &str) -> String {
    format!("seeds/{owner}.json")
}

/// Ten of them at most: the answer has to stay small. The log has no use for them, the bucket has them all.
fn name_some(buckets: &Buckets, places: Vec<Place>) -> String {
    const AT_MOST: usize = 10;
    let more = places.len().saturating_sub(AT_MOST);
    let mut names: Vec<_> = places
        .into_iter()
        .take(AT_MOST)
        .map(|(bucket, key)| format!("s3://{}/{}", buckets.name(bucket), key.chars().take(200).collect::<String>()))
        .collect();
    names.sort();
    if names.is_empty() {
        names.push("nothing".into());
    }
    if more > 0 {
        names.push(format!("and {more} more"));
    }
    names.join(", ")
}

/// Of what is shipped to one bucket: names and contents.
fn digest_of(bucket: Bucket, assets: &BTreeMap<Place, Asset>) -> String {
    let shipped = assets.iter().filter(|(place, _)| place.0 == bucket);
    let texts: Vec<_> = shipped.flat_map(|(place, asset)| [place.1.clone(), hex(&asset.sha256)]).collect();
    hex_digest(texts.iter().map(String::as_str))
}

fn content_type(key: &str) -> &'static str {
    match Path::new(key).extension().and_then(|extension| extension.to_str()) {
        Some("ipynb") => "application/x-ipynb+json",
        Some("json") => "application/json",
        Some("zip") => "application/zip",
        Some("md") => "text/markdown; charset=utf-8",
        _ => "text/plain; charset=utf-8",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The path below the root, with slashes.
fn key_of(root: &Path, path: &Path) -> io::Result<String> {
    let below = path.strip_prefix(root).map_err(io::Error::other)?;
    let key = below.to_str().ok_or_else(|| io::Error::other(format!("{} is not UTF-8", path.display())))?;
    Ok(key.to_owned())
}

/// All files below a folder, sorted.
fn files_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(|why| io::Error::other(format!("{}: {why}", folder.display())))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The folder's content as a zip that has the same bytes whenever the files have: sorted, without times and owners,
/// and with no more of the modes than whether a file can be run.
fn zip_folder(folder: &Path) -> io::Result<Vec<u8>> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for path in files_below(folder)? {
        let can_be_run = fs::metadata(&path)?.permissions().mode() & 0o100 != 0;
        let options = SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated)
            .last_modified_time(zip::DateTime::default())
            .unix_permissions(if can_be_run { 0o755 } else { 0o644 });
        zip.start_file(key_of(folder, &path)?, options)?;
        zip.write_all(&fs::read(&path)?)?;
    }
    Ok(zip.finish()?.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(sha256: &str, etag: &str) -> Put {
        Put { sha256: sha256.into(), etag: etag.into() }
    }

    #[test]
    fn each_object_is_put_kept_or_removed_by_what_is_shipped_was_put_and_is_there() {
        let ours = put("a", "1");
        let cases = [
            (Some("a"), None, None, Step::PutNew),
            (Some("a"), Some(&ours), None, Step::PutNew),
            (Some("a"), Some(&ours), Some("1"), Step::Leave),
            (Some("b"), Some(&ours), Some("1"), Step::Replace { etag: "1".into() }),
            (Some("a"), Some(&ours), Some("2"), Step::Keep),
            (Some("b"), Some(&ours), Some("2"), Step::Keep),
            (Some("a"), None, Some("2"), Step::AskWhose),
            (None, Some(&ours), Some("1"), Step::Remove),
            (None, Some(&ours), Some("2"), Step::Keep),
            (None, Some(&ours), None, Step::Forget),
        ];
        for (shipped, put, there, expected) in cases {
            assert_eq!(step(shipped, put, there), expected, "shipped {shipped:?}, put {put:?}, there {there:?}");
        }
    }

    #[test]
    fn the_same_files_give_the_same_zip_to_the_byte_whenever_and_in_whatever_order_they_were_written() {
        let [one, other] = [["b/run.sh", "a.txt"], ["a.txt", "b/run.sh"]].map(|names| {
            let folder = tempfile::tempdir().unwrap();
            for (second, name) in names.into_iter().enumerate() {
                let path = folder.path().join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, format!("content of {name}")).unwrap();
                let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000 + second as u64 * 60);
                fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            }
            // Group and others may differ from one checkout to the next.
            let mode = if names[0] == "a.txt" { 0o755 } else { 0o700 };
            fs::set_permissions(folder.path().join("b/run.sh"), fs::Permissions::from_mode(mode)).unwrap();
            zip_folder(folder.path()).unwrap()
        });
        assert_eq!(one, other);
        let mut zip = zip::ZipArchive::new(Cursor::new(one)).unwrap();
        assert_eq!(
            [0, 1].map(|number| zip.by_index(number).unwrap().name().unwrap().into_owned()),
            ["a.txt", "b/run.sh"]
        );
        assert_eq!(zip.by_name("b/run.sh").unwrap().unix_mode().unwrap() & 0o777, 0o755);
        assert_eq!(zip.by_name("a.txt").unwrap().unix_mode().unwrap() & 0o777, 0o644);
    }

    #[test]
    fn the_data_names_ten_kept_objects_and_counts_the_rest() {
        let properties = Properties {
            hail_bucket: "h".into(),
            log_bucket: "l".into(),
            notebook_bucket: "n".into(),
            assets_digest: String::new(),
        };
        let places = (0..12).map(|number| (Bucket::Notebook, format!("common-notebooks/{number:02}"))).collect();
        let text = name_some(&Buckets(&properties), places);
        assert!(text.starts_with("s3://n/common-notebooks/00, ") && text.ends_with(", and 2 more"), "{text}");
    }
}
