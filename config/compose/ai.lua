-- The AI service may store its results in Orthanc, and do nothing else there: of the originals it learns nothing.
function IncomingHttpRequestFilter(method, uri, ip, username, headers)
  return username ~= 'ai' or (method == 'POST' and uri == '/dicom-web/studies')
end
