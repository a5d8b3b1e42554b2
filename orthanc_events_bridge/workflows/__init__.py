"""Finished consumers: what people run in Orthanc's callbacks, outside of it.

Each is one module on `orthanc_events_bridge.consumers`, and an example to copy:

- `router`: sends studies, series or instances where rules say.
- `anonymizer`: pseudonymises studies where rules say, and gives results their patients back.
- `dispatch`: sends series to an AI service where rules say, pseudonymised, and its results on.
- `derive`: tells when studies are ready, and when more has come.
- `job_retry`: resubmits Orthanc's jobs that have failed.

What they share: `rules` and `conditions` (their language), `facts` (what Orthanc knows of a resource, as conditions ask
for it), `jobs` (Orthanc's jobs, waited for), `audit` (what left the house), `keywords` (of DICOM), `program` (what a
command runs), `orders` (what one consumer asks of the next), `tables` (of a database). Of the router:
`router_settings`, `destinations` (ways to send). Of the anonymizer: `anonymizer_settings`, `profile` (what becomes of
which element), `pseudonyms`, `deidentify` and `reidentify` (one file), `dicom_files`, `pseudonymous` (Orthanc's
resources), `batch` (files into Orthanc), `memory` (what stands for what), `telling` (its events). Of the AI dispatch:
`dispatch_settings`, `dispatch_steps`, `workflow` (how far each is), `transitions` (what becomes of one), `service`
(ways to ask). Of the job retry: `job_again`, `job_progress`. Of the derived events: `studies`.
"""
