"""Finished consumers: what people run in Orthanc's callbacks, outside of it.

Each is one module on `orthanc_events_bridge.consumers`, and an example to copy:

- `router`, with its options in `router_settings`: sends studies, series or instances where rules say.

What they share: `conditions` (a rule's language), `facts` (what Orthanc knows of a resource, as conditions ask for it),
`destinations` (ways to send), `jobs` (Orthanc's jobs, waited for), `audit` (what left the house).
"""
